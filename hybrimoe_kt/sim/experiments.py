"""The measurements behind docs/reproduction.md: every cell is one replay, nothing is tuned per cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from hybrimoe_kt.core.profile import Profile

from .generate import generate
from .hit_rate import hit_rate
from .models import PAPER_MODELS
from .scenario import METHODS, STATIC, Method, Scenario, recorded, synthetic

HARDWARE = "a6000-xeon5220r"
RATIOS = ("25%", "50%", "75%")
PROMPTS = (32, 128, 512, 1024)
DECODE_PROMPT = 128
DECODE_TOKENS = 64
HIT_TOKENS = 256
PLANNED = ("freetoken", "paper", "default", "host", "device")
PLANNED_HARDWARE = (HARDWARE, "rtx3090-cpu8", "rtx4090-cpu16", "rtx5090-cpu32")
COMPARED = ("gpu streaming", "llama.cpp", "fiddler", "adapmoe", "paper", "default", "oracle")
ABLATION: Mapping[str, Method] = {
    "base": STATIC,
    "+ scheduling": Method("paper", "lru", "off"),
    "+ prefetching": Method("static", "lru", "stale_gate"),
    "+ caching": Method("static", "mrs", "off", policy_options={"alpha": 0.5}, admission=True),
    "all": METHODS["paper"],
}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """Seconds of one model, cache ratio and prompt length, by method; `bound_s` is the lower bound."""

    model: str
    ratio: str
    prompt_tokens: int
    seconds: Mapping[str, float]
    bound_s: float
    hit_rates: Mapping[str, float] = field(default_factory=dict)

    def speedup(self, method: str, over: str = "static") -> float:
        return self.seconds[over] / self.seconds[method]

    def over_best_prefill(self, method: str) -> float:
        """Speed-up over the faster of computing misses on the CPU and streaming them to the GPU."""
        return min(self.seconds["static"], self.seconds["gpu streaming"]) / self.seconds[method]


def decode_cells(progress: Progress, *, hardware: str = HARDWARE, methods: Iterable[str] = COMPARED) -> list[Cell]:
    """Return decode seconds per token for every model and ratio."""
    return [
        _cell(model, ratio, DECODE_PROMPT, DECODE_TOKENS, hardware, tuple(methods), progress)
        for model in PAPER_MODELS
        for ratio in RATIOS
    ]


def prefill_cells(progress: Progress, *, hardware: str = HARDWARE, methods: Iterable[str] = COMPARED) -> list[Cell]:
    """Return seconds to the first token for every model, ratio and prompt length."""
    return [
        _cell(model, ratio, prompt, 0, hardware, tuple(methods), progress)
        for model in PAPER_MODELS
        for ratio in RATIOS
        for prompt in PROMPTS
    ]


def _cell(
    model: str, ratio: str, prompt: int, tokens: int, hardware: str, methods: tuple[str, ...], progress: Progress
) -> Cell:
    progress(f"{model}, {ratio} cache, {prompt} prompt tokens")
    scenario = synthetic(model, hardware, ratio, prompt_tokens=prompt, tokens=tokens)
    runs = {name: scenario.run(METHODS[name]) for name in ("static", *methods)}
    seconds = {name: run.token_s if tokens else run.ttft_s for name, run in runs.items()}
    hits = {name: run.phases["decode"].hit_rate for name, run in runs.items()} if tokens else {}
    return Cell(model, ratio, prompt, seconds, scenario.bound_s("decode" if tokens else "prefill"), hits)


def ablation(progress: Progress, *, prompt_tokens: int = DECODE_PROMPT) -> dict[str, tuple[float, float]]:
    """Return row -> (seconds to the first token, seconds per token) for Qwen2 at a quarter of the experts."""
    scenario = synthetic("qwen2-57b-a14b", HARDWARE, "25%", prompt_tokens=prompt_tokens, tokens=DECODE_TOKENS)
    rows = {}
    for name, method in ABLATION.items():
        progress(f"ablation, {name}")
        run = scenario.run(method)
        rows[name] = (run.ttft_s, run.token_s)
    return rows


Policies = Mapping[str, tuple[str, Mapping[str, float], bool]]
"""label -> (policy, options, bypass)."""
POLICIES: Policies = {
    "LRU": ("lru", {}, False),
    "MRS 0.5": ("mrs", {"alpha": 0.5}, False),
    "MRS 0.5, bypass": ("mrs", {"alpha": 0.5}, True),
    "MRS": ("mrs", {}, False),
    "MRS, bypass": ("mrs", {}, True),
    "LFU": ("lfu", {}, False),
    "adaptive": ("adaptive", {}, False),
    "Belady": ("belady", {}, False),
}


def hit_rates(progress: Progress, policies: Policies) -> dict[str, dict[str, float]]:
    """Return "model ratio" -> label -> hit rate of a cache alone on synthetic decode steps."""
    table: dict[str, dict[str, float]] = {}
    for model in PAPER_MODELS:
        progress(f"hit rates, {model}")
        trace = generate(model, prompt_tokens=0, tokens=HIT_TOKENS, depth=0)
        for ratio in RATIOS:
            slots = int(float(ratio[:-1]) / 100 * trace.num_experts)
            table[f"{model} {ratio}"] = {
                label: hit_rate(trace, name, slots, options, bypass=bypass)
                for label, (name, options, bypass) in policies.items()
            }
    return table


def launch_cost_sweep(progress: Progress, seconds: Iterable[float]) -> dict[float, dict[str, float]]:
    """Return GPU seconds per expert call -> method -> mean decode speed-up over static, all else as the profile."""
    table = {}
    for call_s in seconds:
        progress(f"GPU call of {call_s * 1e3:.2f} ms")
        sums = dict.fromkeys(("paper", "default", "oracle", "bound"), 0.0)
        for model in PAPER_MODELS:
            for ratio in RATIOS:
                scenario = _with_profile(synthetic(model, HARDWARE, ratio, tokens=24), gpu_call_s=call_s)
                static_s = scenario.run(STATIC).token_s
                for name in ("paper", "default", "oracle"):
                    sums[name] += static_s / scenario.run(METHODS[name]).token_s
                sums["bound"] += static_s / scenario.bound_s("decode")
        table[call_s] = {name: total / (len(PAPER_MODELS) * len(RATIOS)) for name, total in sums.items()}
    return table


def _with_profile(scenario: Scenario, **changes: float) -> Scenario:
    profile: Profile = replace(scenario.profile, **changes)  # type: ignore[arg-type]
    return replace(scenario, profile=profile)


def recorded_cells(
    progress: Progress, files: Mapping[str, str], methods: Iterable[str], hardware: str = HARDWARE
) -> list[Cell]:
    """Return decode seconds per token of recorded traces at 12.5, 25 and 50 %."""
    cells = []
    for name, path in files.items():
        for ratio in ("12.5%", "25%", "50%"):
            progress(f"{name}, {ratio}, {hardware}")
            scenario = recorded(path, hardware, ratio)
            runs = {method: scenario.run(METHODS[method]) for method in ("static", *methods)}
            seconds = {method: run.token_s for method, run in runs.items()}
            hits = {method: run.phases["decode"].hit_rate for method, run in runs.items()}
            cells.append(Cell(name, ratio, 0, seconds, scenario.bound_s("decode"), hits))
    return cells
