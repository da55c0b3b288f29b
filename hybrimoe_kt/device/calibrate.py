"""Measures this machine and writes what it finds as a profile: the numbers every plan is predicted with."""

from __future__ import annotations

import datetime
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hybrimoe_kt.cache_folder import cache_folder
from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import Profile, parse_profile
from hybrimoe_kt.errors import CalibrationError
from hybrimoe_kt.profiles import load_profile

from .accelerator import Accelerator
from .backend import CpuBackend, GpuBackend
from .cores import physical_cores
from .host_store import HostStore
from .measure import CpuMeter, GpuMeter, LinkMeter, Sample
from .step_meter import StepMeter
from .waiting import Deadline

__all__ = [
    "Calibration",
    "calibrate",
    "compared_sample",
    "link_verdict",
    "machine_name",
    "profile_path",
    "trusted_profile",
]

CPU_LOADS = (1, 2, 4, 8, 32, 128)
COMPARED_LOADS = (1, 2, 8, 32, 128)
"""Tokens an expert has in a call, where CPU backends are compared."""
GPU_LOADS = (1, 8, 64, 512)
_LINK_BYTES = (2**16, 2**25)
_CHUNK_BYTES = (2**18, 2**19, 2**20, 2**21, 2**22)
_RATE_KEPT = 0.9
_WORST_CROWDING = 2.0
"""How much slower CPU experts are believed to be beside the host's work: one core instead of two."""
_GUESSED_LAYER_S = {"cpu": 1.5e-3, "gpu": 5e-4}
"""Time per decoder layer outside the experts, which no experts tell: the CPU's as in the built-in profiles, the GPU's
from the host time of Transformers' eager modules (336 us a layer measured on an EPYC core). Corrected in
service, see `runtime.feedback`."""
_PCIE = tuple(
    (f"PCIe {generation} x{lanes}", rate * lanes / 16)
    for lanes in (16, 8, 4)
    for generation, rate in ((3, 15.8), (4, 31.5), (5, 63.0), (6, 126.0))
)
"""Nominal GB/s in one direction, the usual links first; page-locked copies reach 70-90 % of it."""


@dataclass(slots=True)
class Calibration:
    """A finished calibration: the profile, its JSON, and every sample behind it by name."""

    profile: Profile
    text: str
    samples: dict[str, Sample] = field(default_factory=dict)
    verdict: str = ""
    """One line on whether the link is what one would expect."""

    @property
    def spread(self) -> float:
        """How far the samples spread: the median over all things measured of 90th over 10th percentile."""
        return statistics.median(sample.high_s / sample.low_s for sample in self.samples.values())

    def save(self, path: Path) -> Path:
        """Write the profile file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text, encoding="utf-8")
        return path


def machine_name(accelerator: Accelerator | None, cpu: CpuBackend) -> str:
    """What a profile holds for: processor, cores, experts' threads, CPU backend, accelerator."""
    threads = getattr(cpu, "num_threads", 0)
    device = accelerator.describe() if accelerator is not None else "no accelerator"
    return f"{_processor()}, {physical_cores()} cores, {threads} expert threads of {cpu.name}, {device}"


def compared_sample(backend: str, load: int) -> str:
    """What the sample of a compared CPU backend is called."""
    return f"{backend}, 1 expert, {load} token{'s' * (load > 1)}"


def profile_path(machine: str) -> Path:
    """Where the profile of `machine` is kept between runs."""
    return cache_folder() / f"profile-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def trusted_profile(name_or_path: str, machine: str) -> Profile:
    """Load a profile; CalibrationError if it was measured on another machine. Built-in ones were measured on none."""
    profile = load_profile(name_or_path)
    if profile.machine and profile.machine != machine:
        raise CalibrationError(
            f"profile {name_or_path} was measured on another machine ({profile.machine}; this is {machine}); "
            f"run `hybrimoe calibrate` here, or leave --profile out"
        )
    return profile


def calibrate(
    store: HostStore,
    layer: int,
    cpu: CpuBackend,
    accelerator: Accelerator | None,
    gpu: GpuBackend | None,
    *,
    max_tokens: int,
    repeats: int = 15,
    deadline: Deadline | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """Measure with the experts of `layer`, which `cpu` has taken already; `progress` is told before each piece.

    `max_tokens` bounds a call. Takes seconds to a minute with 15 repeats.
    """
    deadline = deadline or Deadline(60.0)
    run = _Run(store, layer, cpu, max_tokens, repeats, deadline, progress)
    run.compare_cpu()
    run.measure_cpu()
    if accelerator is not None and gpu is not None:
        run.measure_link(accelerator)
        run.measure_gpu(accelerator, gpu)
        run.measure_steps(accelerator, gpu)
    return run.result(machine_name(accelerator, cpu))


class _Run:
    """One calibration under way: samples by name, numbers and their sources by profile key."""

    def __init__(
        self,
        store: HostStore,
        layer: int,
        cpu: CpuBackend,
        max_tokens: int,
        repeats: int,
        deadline: Deadline,
        progress: Callable[[str], None],
    ) -> None:
        self._store, self._layer, self._repeats, self._progress = store, layer, repeats, progress
        self._experts, self._deadline, self._max_tokens = store.layers[layer], deadline, max_tokens
        self._cpu, self._meter = cpu, CpuMeter(cpu, self._experts, deadline)
        self._macs = 3 * self._experts.hidden * self._experts.inter
        self.samples: dict[str, Sample] = {}
        self.compared: dict[str, dict[int, float]] = {}
        self.numbers: dict[str, float] = {"num_cpu_cores": physical_cores(), "cpu_layer_s": _GUESSED_LAYER_S["cpu"]}
        self.sources = {"num_cpu_cores": "counted", "cpu_layer_s": "not measured: as in the built-in profiles"}

    def _sample(self, name: str, measure: Callable[[], Sample]) -> float:
        self._progress(name)
        self.samples[name] = measure()
        return self.samples[name].median_s

    def _set(self, key: str, value: float, source: str) -> None:
        self.numbers[key], self.sources[key] = value, source

    def compare_cpu(self) -> None:
        """Time the backends that the CPU's chooses among, where they are several, and let it choose."""
        candidates = self._cpu.candidates()
        for name, backend in candidates.items() if len(candidates) > 1 else ():
            meter = CpuMeter(backend, self._experts, self._deadline)
            self._touch(meter, name)
            times = self.compared[name] = {}
            for load in COMPARED_LOADS:
                if load <= self._max_tokens and (load == 1 or not backend.for_one_token):
                    times[load] = self._sample(compared_sample(name, load), partial(meter.call, 1, load, self._repeats))
        self._cpu.choose(self.compared)

    def _touch(self, meter: CpuMeter, name: str) -> None:
        """Compute every expert once, uncounted: what is touched first is slower."""
        most = max(1, self._experts.top_k)
        self._progress(f"{name}, every expert once")
        meter.call(most, 1, -(-self._experts.num_experts // most))

    def measure_cpu(self) -> None:
        most = max(1, self._experts.top_k)
        self._touch(self._meter, "CPU")
        many = self._sample(f"CPU, {most} experts, 1 token", lambda: self._meter.call(most, 1, self._repeats))
        loads = [load for load in CPU_LOADS if load <= self._max_tokens]
        times = {load: self._cpu_expert(load) for load in loads}
        single_s = (many - times[1]) / (most - 1) if most > 1 else times[1]
        if not 0.0 < single_s <= times[1]:
            single_s = times[1]
        call_s = min(max(0.0, times[1] - single_s), 0.5 * min(times.values()))
        num_bytes = self._experts.expert_bytes
        base_s, token_s = _line({load: seconds - call_s for load, seconds in times.items() if load > 1}, single_s)
        first = self.samples["CPU, 1 expert, 1 token"]
        self._set("cpu_call_s", call_s, f"{most} experts against one at 1 token; one: {first}")
        self._set("cpu_expert_s", 0.0, "0: within the time to read an expert")
        self._set("cpu_single_bytes_per_s", num_bytes / single_s, f"{most} experts against one at 1 token")
        fitted = ", ".join(f"{load} tokens {seconds * 1e3:.2f} ms" for load, seconds in times.items())
        self._set("cpu_bytes_per_s", num_bytes / base_s, f"a line through the medians: {fitted}")
        self._set("cpu_macs_per_s", self._macs / token_s, "slope of that line")

    def _cpu_expert(self, load: int) -> float:
        name = f"CPU, 1 expert, {load} token{'s' * (load > 1)}"
        return self._sample(name, lambda: self._meter.call(1, load, self._repeats))

    def measure_link(self, accelerator: Accelerator) -> None:
        small, large = _LINK_BYTES
        link = LinkMeter(accelerator, large, self._deadline)
        times = {}
        for page_locked, memory in ((True, "page-locked"), (False, "pageable")):
            for size in _LINK_BYTES:
                name = f"link, {size / 2**20:g} MiB {memory}"
                copied = partial(link.copy, size, self._repeats, page_locked=page_locked)
                times[memory, size] = self._sample(name, copied)
        longer_s = times["page-locked", large] - times["page-locked", small]
        if longer_s <= 0.0:
            raise CalibrationError(
                f"a copy of {large / 2**20:g} MiB measured faster than one of {small / 2**10:g} KiB; "
                f"something else keeps the machine busy, repeat when it is alone"
            )
        bytes_per_s = (large - small) / longer_s
        latency_s = max(0.0, times["page-locked", small] - small / bytes_per_s)
        pageable = large / times["pageable", large]
        both = self.samples[f"link, {large / 2**20:g} MiB page-locked"]
        self._set("link_bytes_per_s", bytes_per_s, f"32 MiB page-locked: {both}; pageable {pageable / 1e9:.1f} GB/s")
        self._set("link_latency_s", latency_s, "64 KiB page-locked, less its bytes")
        self._measure_chunks(link, large / times["page-locked", large])
        self._measure_contention(link, large)
        link.release()

    def _measure_chunks(self, link: LinkMeter, best_bytes_per_s: float) -> None:
        """The smallest chunk that keeps nine tenths of the link's rate."""
        for size in _CHUNK_BYTES:
            copied = partial(link.copy, size, self._repeats, copies=8)
            seconds = self._sample(f"link, {size / 2**20:g} MiB chunks", copied)
            if size / seconds >= _RATE_KEPT * best_bytes_per_s or size == _CHUNK_BYTES[-1]:
                rate = f"{size / seconds / 1e9:.1f} GB/s in chunks of it, {best_bytes_per_s / 1e9:.1f} in large copies"
                self._set("link_chunk_bytes", size, rate)
                return

    def _measure_contention(self, link: LinkMeter, num_bytes: int) -> None:
        feed = link.keep_busy(num_bytes)
        load = min(8, self._max_tokens)

        def busy(number: int) -> float:
            feed()
            return self._meter.call(1, load, 1).median_s

        alone = self._sample(
            f"CPU, 1 expert, {load} tokens, link idle", lambda: self._meter.call(1, load, self._repeats)
        )
        together = self._sample(f"CPU, 1 expert, {load} tokens, link busy", lambda: Sample.repeat(self._repeats, busy))
        source = f"an expert of {load} tokens beside copies: {self.samples[f'CPU, 1 expert, {load} tokens, link busy']}"
        self._set("cpu_slowdown_while_link_busy", max(1.0, together / alone), source)

    def measure_gpu(self, accelerator: Accelerator, gpu: GpuBackend) -> None:
        if gpu.refuses(self._experts) is not None:
            raise CalibrationError(f"no GPU kernel runs these experts: {gpu.refuses(self._experts)}")
        loads = [load for load in GPU_LOADS if load <= self._max_tokens]
        meter = GpuMeter(
            accelerator, gpu, self._store, self._layer,
            num_slots=self._experts.top_k, max_tokens=max(loads), deadline=self._deadline,
        )  # fmt: skip
        most = meter.num_slots
        one = self._sample("GPU, 1 expert, 1 token", lambda: meter.launch(1, 1, self._repeats))
        many = self._sample(f"GPU, {most} experts, 1 token", lambda: meter.launch(most, 1, self._repeats))
        each_s = (many - one) / (most - 1) if most > 1 and many > one else many / most
        call_s = max(0.0, many / most - each_s)
        for load in loads[1:]:
            self._sample(f"GPU, 1 expert, {load} tokens", partial(meter.launch, 1, load, self._repeats))
        last = loads[-1]  # one expert does not fill a large GPU
        name = f"GPU, {most} experts, {last} tokens each"
        last_s = self._sample(name, lambda: meter.launch(most, last, self._repeats)) / most
        meter.release()
        source = f"{most} experts in one launch against one: {self.samples['GPU, 1 expert, 1 token']} for one"
        self._set("gpu_call_s", call_s, source)
        self._set("gpu_bytes_per_s", self._experts.expert_bytes / each_s, source)
        token_s = max(1e-12, last_s - call_s) / last
        source = f"{most} experts with {last} tokens each in one launch: {self.samples[name]}"
        self._set("gpu_macs_per_s", self._macs / token_s, source)
        self._set("gpu_layer_s", _GUESSED_LAYER_S["gpu"], "not measured: a guess that decode steps correct in service")

    def measure_steps(self, accelerator: Accelerator, gpu: GpuBackend) -> None:
        """CPU experts beside the host's own work: plans are hybrid, so that is what they cost there."""
        cost = CostModel.from_profile(
            self._profile("so far"), expert_bytes=self._experts.expert_bytes, expert_macs=self._macs
        )
        meter = StepMeter(
            accelerator, self._cpu, gpu, self._store, self._layer, cost,
            pause_s=_GUESSED_LAYER_S["gpu"], deadline=self._deadline,
        )  # fmt: skip
        few, many = meter.least_on_cpu, max(self._experts.top_k - 1, meter.least_on_cpu)
        times = {
            num: self._sample(f"a hybrid step, {num} on the CPU", partial(meter.step, num, 3 * self._repeats))
            for num in {few, many}
        }
        alone_s = cost.cpu_expert_s[1]
        beside_s = (times[many] - times[few]) / (many - few) if many > few else alone_s
        beside_s = min(max(beside_s, alone_s), _WORST_CROWDING * alone_s)
        overhead_s = max(0.0, times[few] - cost.cpu_call_s - few * beside_s)
        source = (
            f"hybrid steps with {few} and {many} experts on the CPU: {self.samples[f'a hybrid step, {few} on the CPU']}"
        )
        self._set(
            "cpu_single_bytes_per_s", self._experts.expert_bytes / beside_s, f"{source}; alone {alone_s * 1e3:.3f} ms"
        )
        self._set("step_overhead_s", overhead_s, f"what is left of {source}")

    def _profile(self, machine: str) -> Profile:
        return parse_profile(self._text(machine), name="measured", file="calibration")

    def result(self, machine: str) -> Calibration:
        profile = self._profile(machine)
        verdict = link_verdict(profile.link_bytes_per_s) if profile.link_bytes_per_s else ""
        return Calibration(profile, self._text(machine), self.samples, verdict)

    def _text(self, machine: str) -> str:
        matrices = "/".join(matrix.type_name for matrix in self._experts.matrices)
        data = {
            "hardware": machine,
            "machine": machine,
            "date": datetime.date.today().isoformat(),
            "measured": (
                f"by hybrimoe calibrate: medians of {self._repeats}, experts of "
                f"{self._experts.hidden}x{self._experts.inter} {matrices}"
            ),
            **self.numbers,
            **({"cpu_backends": self.compared} if self.compared else {}),
            "source": self.sources,
        }
        return json.dumps(data, indent=2) + "\n"


def link_verdict(bytes_per_s: float) -> str:
    """Name the PCIe link whose usual rate is nearest ("link 21.3 GB/s: PCIe 4 x16 as expected")."""
    rate = bytes_per_s / 1e9
    for name, nominal in _PCIE:
        if 0.6 * nominal <= rate <= 0.95 * nominal:
            return f"link {rate:.1f} GB/s: {name} as expected"
    return (
        f"link {rate:.1f} GB/s: no PCIe link reaches that at its usual 70-90 %; "
        f"check the slot, a riser, or what else uses the link"
    )


def _line(times: dict[int, float], fallback_s: float) -> tuple[float, float]:
    """Fit `base + slope * load` in relative error; both positive."""
    if len(times) < 2:
        return fallback_s, fallback_s / 8
    weight = {load: 1 / seconds**2 for load, seconds in times.items()}
    total = sum(weight.values())
    mean_load = sum(weight[load] * load for load in times) / total
    mean_s = sum(weight[load] * seconds for load, seconds in times.items()) / total
    spread = sum(weight[load] * (load - mean_load) ** 2 for load in times)
    slope = sum(weight[load] * (load - mean_load) * (times[load] - mean_s) for load in times) / spread
    slope = max(slope, 1e-12)
    return max(mean_s - slope * mean_load, min(times.values()) * 0.05), slope


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
