"""What is simulated: a model on a machine with a cache, its routing, and the methods compared on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.device_coordinator import DeviceCoordinator
from hybrimoe_kt.core.prefetch.predictors import PREDICTORS
from hybrimoe_kt.core.profile import Profile
from hybrimoe_kt.core.strategy import Strategy
from hybrimoe_kt.core.timeline import Span
from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.errors import ConfigError, unknown_name
from hybrimoe_kt.profiles import load_profile
from hybrimoe_kt.sizes import CacheSize

from .bound import lower_bound
from .generate import generate
from .hit_rate import future
from .models import DENSE_BITS, ModelSpec, find_model
from .replay import LookAhead, Outside, Replay, no_look_ahead, perfect_look_ahead, recorded_look_ahead, replay
from .trace import Phase, Trace, join
from .trace_file import read_trace

WARMUP_PROMPT = 32
WARMUP_TOKENS = 16
WARMUP_SEED = 7919
"""The warm-up request: another prompt to the same model, served before the measured one and not counted."""
OFF = "off"
HOST, DEVICE = PLANNERS = ("host", "device")
PREFETCH = (OFF, *PREDICTORS)
_SEES_GATES: Mapping[str, LookAhead] = {
    "stale_gate": recorded_look_ahead,
    "corrected_gate": recorded_look_ahead,
    "perfect": perfect_look_ahead,
}
"""What the host hands each predictor; the others learn on their own."""


@dataclass(frozen=True)
class Method:
    """A policy configuration.

    `by_layer` spends the cache on whole layers instead of a share of each; `by_frequency` fills the cache with the
    experts that the warm-up request used most, instead of the lowest numbers. `admission` brings experts that the CPU
    just computed for later tokens, also with prefetch "off"; None leaves it to the coordinator. With `planner` "device"
    single tokens are planned by the rules of `core.device_rules`.
    """

    scheduler: str = "balanced"
    policy: str = "adaptive"
    prefetch: str = "stale_gate"
    prefetch_size: int = 4
    prefetch_depth: int = 3
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    predictor_options: Mapping[str, Any] = field(default_factory=dict)
    admission: bool | None = None
    by_layer: bool = False
    by_frequency: bool = False
    planner: str = HOST

    def __post_init__(self) -> None:
        if self.prefetch not in PREFETCH:
            raise ConfigError(unknown_name("prefetch predictor", self.prefetch, PREFETCH))
        if self.planner not in PLANNERS:
            raise ConfigError(unknown_name("planner", self.planner, PLANNERS))

    @property
    def strategy(self) -> Strategy:
        """The coordinator's part of it."""
        is_off = self.prefetch == OFF
        return Strategy(
            scheduler=self.scheduler,
            scheduler_options=self.scheduler_options,
            policy=self.policy,
            policy_options=self.policy_options,
            predictor="stale_gate" if is_off else self.prefetch,
            predictor_options={} if is_off else self.predictor_options,
            prefetch_size=0 if is_off and not self.admission else self.prefetch_size,
            prefetch_depth=self.prefetch_depth,
            admission=self.admission,
        )

    @property
    def look_ahead(self) -> LookAhead:
        return _SEES_GATES.get(self.prefetch, no_look_ahead)


STATIC = Method("static", "lru", "off")
METHODS: Mapping[str, Method] = {
    "default": Method(prefetch_size=2),
    "paper": Method("paper", "mrs", policy_options={"alpha": 0.5}),
    "static": STATIC,
    "static by frequency": replace(STATIC, by_frequency=True),
    "gpu streaming": Method("gpu_only", "lru", "off"),
    "llama.cpp": Method("layer_split", "lru", "off", by_layer=True),
    "adapmoe": Method("gpu_only", "lru", "stale_gate"),
    "fiddler": Method("fiddler", "lru", "off"),
    "freetoken": Method("one_ratio", "lru", "off"),
    "host": Method(policy="mrs", prefetch_size=2),
    "device": Method(policy="mrs", prefetch_size=2, planner=DEVICE),
    "oracle": Method("balanced", "belady", "perfect", prefetch_size=16),
}
"""Named configurations: ours, the paper's, the published baselines and the bound in practice.

"host" is what "device" is to be compared with: the same policy, planned on the host.
"""


@dataclass(frozen=True)
class Scenario:
    """One trace on one machine with one cache size; `warmup` leading steps are served but not measured.

    `layers` describes every MoE layer where they are not alike; `num_slots` is then the most of any.
    """

    trace: Trace
    profile: Profile
    num_slots: int
    model: ModelSpec | None = None
    warmup: int = 0
    layers: tuple[LayerSpec, ...] = ()

    @property
    def ratio(self) -> float:
        return self.num_slots / self.trace.num_experts

    def prompts_only(self) -> Scenario:
        """Return the scenario up to its last prompt; all of it where it has none."""
        last = max(
            (step.index for step in self.trace.steps if step.phase == "prefill"), default=len(self.trace.steps) - 1
        )
        return replace(self, trace=self.trace.head(last + 1))

    def costs(self) -> dict[int, CostModel]:
        """Return the cost model of each MoE layer; layers of one expert size share theirs."""
        sizes = self.trace.expert_bytes
        macs = self.trace.run.get("expert_macs") or [None] * len(sizes)
        shapes = list(zip(sizes, macs, strict=True))
        models = {shape: layer_cost(self.profile, shape[0], self.model, shape[1]) for shape in set(shapes)}
        return {layer: models[shape] for layer, shape in zip(self.trace.layers, shapes, strict=True)}

    def specs(self, method: Method) -> tuple[LayerSpec, ...]:
        """Return the layers with this method's slots."""
        if not method.by_layer:
            return self.layers or self.trace.specs(self.num_slots)
        whole = round(self.ratio * len(self.trace.layers))
        layers = range(len(self.trace.layers))
        return self.trace.specs(tuple(self.trace.num_experts if i < whole else 0 for i in layers))

    def run(
        self,
        method: Method,
        *,
        noise: float = 0.0,
        seed: int = 0,
        on_span: Callable[[Span], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Replay:
        """Replay the trace under `method` with a fresh coordinator whose cache starts full."""
        specs, costs = self.specs(method), self.costs()
        coordinator = make_coordinator(specs, costs, method, self)
        return replay(
            self.trace,
            coordinator,
            specs,
            costs,
            look_ahead=method.look_ahead,
            outside=outside_seconds(self.profile, self.model),
            warmup=self.warmup,
            noise=noise,
            seed=seed,
            on_span=on_span,
            progress=progress,
        )

    def bound_s(self, phase: Phase) -> float:
        """Return seconds per step that no method can beat."""
        inside = lower_bound(self.trace, phase, self.num_slots, self.costs(), warmup=self.warmup)
        counts = [step.num_tokens for step in self.trace.phase_steps(phase) if step.index >= self.warmup]
        outside = outside_seconds(self.profile, self.model)
        return inside + sum(map(outside.seconds, counts)) / max(1, len(counts))


def make_coordinator(
    specs: tuple[LayerSpec, ...], costs: Mapping[int, CostModel], method: Method, scenario: Scenario
) -> Coordinator | DeviceCoordinator:
    """Return a coordinator configured as `method`, its slots filled; only the offline policy learns the future."""
    policy_options = dict(method.policy_options)
    if method.policy == "belady":
        policy_options.setdefault("future", future(scenario.trace))
    strategy = replace(method.strategy, policy_options=policy_options)
    frequencies = warmup_frequencies(scenario) if method.by_frequency else None
    coordinator = Coordinator(specs, costs, strategy, frequencies=frequencies)
    coordinator.initial_transfers()
    return coordinator if method.planner == HOST else DeviceCoordinator(coordinator)


def warmup_frequencies(scenario: Scenario) -> dict[int, list[float]]:
    """Return layer -> tokens that each expert computed in the warm-up steps (in the first step without warm-up)."""
    trace = scenario.trace
    counts = {layer: [0.0] * trace.num_experts for layer in trace.layers}
    for step in trace.steps[: max(1, scenario.warmup)]:
        for position, layer in enumerate(trace.layers):
            for expert, load in trace.routing(step, position).loads.items():
                counts[layer][expert] += load
    return counts


def layer_cost(
    profile: Profile, expert_bytes: int, model: ModelSpec | None, expert_macs: int | None = None
) -> CostModel:
    """Return the seconds of one MoE layer; without a model there are neither shared experts nor attention bytes."""
    if model is None:
        return CostModel.from_profile(profile, expert_bytes=expert_bytes, expert_macs=expert_macs)
    return CostModel.from_profile(
        profile,
        expert_bytes=expert_bytes,
        expert_macs=model.expert_params,
        shared_bytes=_dense_bytes(model.shared_params),
        shared_macs=model.shared_params,
        dense_bytes=_dense_bytes(model.attention),
        dense_macs=model.attention,
    )


def outside_seconds(profile: Profile, model: ModelSpec | None) -> Outside:
    """Return the seconds of layers without experts and of the output head (one token's logits)."""
    if model is None:
        return Outside()
    count = model.num_layers - len(model.moe_layers)
    dense = model.attention + model.dense_params
    layer = _dense_cost(profile, dense) if count else None
    head_s = _dense_cost(profile, model.head_params).between_layers_s[1]
    if layer is None:
        return Outside(head_s=head_s)
    return Outside(count * layer.dense_s, count * layer.dense_token_s, head_s)


def _dense_cost(profile: Profile, params: int) -> CostModel:
    return CostModel.from_profile(profile, expert_bytes=1, dense_bytes=_dense_bytes(params), dense_macs=params)


def _dense_bytes(params: int) -> int:
    return int(params * DENSE_BITS / 8)


def synthetic(
    model: str, hardware: str, cache: str | float | int, *, prompt_tokens: int = 128, tokens: int = 64, seed: int = 0
) -> Scenario:
    """Return a scenario on a generated trace: a warm-up request, then the measured one."""
    spec, profile = find_model(model), load_profile(hardware)
    trace = _generated(spec, prompt_tokens, tokens, seed)
    return Scenario(trace, profile, find_slots(cache, trace), spec, warmup=1 + WARMUP_TOKENS)


@lru_cache(maxsize=8)
def _generated(spec: ModelSpec, prompt_tokens: int, tokens: int, seed: int) -> Trace:
    """Cache traces: building the `Routing` objects costs as much as a replay."""
    warmup = generate(spec, prompt_tokens=WARMUP_PROMPT, tokens=WARMUP_TOKENS, seed=seed + WARMUP_SEED)
    return join(warmup, generate(spec, prompt_tokens=prompt_tokens, tokens=tokens, seed=seed))


def recorded(
    path: str, hardware: str, cache: str | float | int, *, model: str | None = None, tokens: int | None = None
) -> Scenario:
    """Return a scenario on a trace file; `model` adds the costs of attention and shared experts."""
    trace, profile = read_trace(path), load_profile(hardware)
    spec = None if model is None else find_model(model)
    if spec is not None:
        _check_fits(trace, spec, path)
        spec = replace(spec, top_k=trace.top_k)
    if tokens is not None:
        prompts = sum(step.phase == "prefill" for step in trace.steps)
        trace = trace.head(min(len(trace.steps), prompts + tokens))
    return Scenario(trace, profile, find_slots(cache, trace), spec)


def _check_fits(trace: Trace, spec: ModelSpec, path: str) -> None:
    shape, expected = (len(trace.layers), trace.num_experts), (len(spec.moe_layers), spec.num_experts)
    if shape != expected:
        raise ConfigError(
            f"{path}: a trace of {shape[0]} MoE layers with {shape[1]} experts does not fit {spec.name}"
            f" ({expected[0]} layers, {expected[1]} experts); name the right --model or leave it out"
        )


def find_slots(cache: str | float | int, trace: Trace) -> int:
    """Return GPU slots per layer for a share ("25%", 0.25), a count per layer (16) or bytes ("12GiB")."""
    size = CacheSize.parse(cache)
    if size.fraction is not None:
        slots = int(size.fraction * trace.num_experts + 1e-9)
    elif size.num_bytes is not None:
        slots = size.num_bytes // sum(trace.expert_bytes)
    elif size.per_layer is not None:
        slots = size.per_layer
    else:
        raise ConfigError("cache auto needs a machine to look at; give a share (25%), a count per layer (16) or bytes")
    if slots < 1:
        raise ConfigError(f"cache {cache} leaves no slot for the {trace.num_experts} experts of a layer; give more")
    if slots > trace.num_experts:
        raise ConfigError(
            f"cache {cache} is larger than the model: {slots} slots for {trace.num_experts} experts a layer; give at"
            " most 100%"
        )
    return slots
