"""Every option of the expert runtime: validated once, each with its unit and default.

A rule file's `kwargs` and the command line both end here, so both get the same errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import accelerators
from .backends.registry import DEFAULT_CPU, check_cpu, check_gpu
from .core.device_coordinator import rules_of
from .core.strategy import Strategy
from .errors import ConfigError, nearest, unknown_name
from .sizes import CacheSize, parse_bytes

__all__ = ["ExpertOptions"]

HOST_STORES = ("auto", "mapped", "page_locked")
PLANNERS = ("host", "device")


if TYPE_CHECKING:

    class _CacheSize:
        """For type checkers: a field that is given as any of these, and read as a CacheSize."""

        def __get__(self, options: object, cls: type | None = None) -> CacheSize: ...

        def __set__(self, options: object, value: CacheSize | str | int | float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """Options of `HybriMoEExperts`, shared by every MoE layer of a model."""

    accelerator: str = "auto"
    """Where slots live: "none" (all experts on the CPU), "cuda", "xpu", "emulated"; auto takes what is found.

    Layers may name different ones, in rules of their own. See `hybrimoe_kt.accelerators`.
    """
    cpu_backend: str = DEFAULT_CPU
    """Who computes experts on the CPU: a name of `backends.registry`, or a class, "package.module:Class".

    auto is ggml, and kt-kernel where `hybrimoe calibrate` found it faster.
    """
    ggml_library: str = ""
    """Another build of ggml than libggml-python's: the directory of libggml-base and libggml-cpu, or one library."""
    gpu_backend: str = "auto"
    """Who computes experts on the accelerator: auto takes the Triton kernels where they run, else torch. Or a class.

    On an emulated accelerator auto is torch_reference, slow and exact; triton runs there in Triton's interpreter.
    """
    cpu_threads: int = 0
    """Threads computing CPU experts, and dense layers on a CPU; 0 takes all cores, beside an accelerator all but two.

    For backends whose threads spin between calls, kt-kernel's, half of them.
    """
    cache_size: _CacheSize = field(default_factory=CacheSize)  # type: ignore[assignment]
    """How many experts may live on the accelerator; given in any way that `CacheSize.parse` reads."""
    policy: str = "adaptive"
    """Which expert loses its slot."""
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "balanced"
    """Who computes what in one step."""
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    planner: str = "host"
    """Who plans single tokens: the host, or, within one captured step, kernels on the "device".

    The device keeps experts by mrs, which then takes adaptive's place, or lru, and looks ahead by stale_gate. No device
    has run it yet, so it has to be asked for.
    """
    prefetch_size: int = 2
    """Transfers started ahead of need per layer; 0 switches prefetching off."""
    prefetch_depth: int = 3
    """How many layers ahead the gates are asked, 1 to 3."""
    predictor: str = "stale_gate"
    """What guesses the next layers' routing for the prefetcher."""
    predictor_options: Mapping[str, Any] = field(default_factory=dict)
    profile: str = "auto"
    """Name of a built-in hardware profile, or a profile file; auto takes this machine's own, see `device.calibrate`."""
    max_chunk_tokens: int = 512
    """Longest piece of a prompt computed at once, tokens; sizes every buffer."""
    host_store: str = "auto"
    """Where transfers come from: the "mapped" file through staging, or a "page_locked" copy of all experts.

    auto copies when the host has room for it beside the file, see `device.host_store`.
    """
    transfer_chunk_bytes: int = 0
    """Largest piece of a prefetch given to the link at once, bytes: how long an on-demand transfer may be held up.

    0 takes what the profile says was measured, or 1 MiB.
    """
    reserve_bytes: int = 2**28
    """Accelerator memory that is left free beside all that is planned, for what allocators round and others take.

    256 MiB is a choice, not measured.
    """
    card_bytes: int = 0
    """Size of the accelerator to plan for, bytes, with what CUDA's context takes; 0: all that is free.

    Less than a card has leaves room for others; an emulated accelerator is planned as a card of that size.
    """
    prefill_streaming_bytes: int = 0
    """Accelerator memory, beside `cache_size`, for two whole layers of experts streamed ahead in prefill; 0: none."""
    deadline_s: float = 60.0
    """How long anything may take before it counts as dead, seconds."""
    fallback: bool = True
    """Give up hybrid plans when they measure slower than one device alone, see `core.feedback`."""
    follow_pace: bool = True
    """Let predictions follow what the CPU's experts take in service, see `core.feedback`."""
    strategy: Strategy = field(init=False, repr=False, compare=False)
    """The fields of a `Strategy` among these, together."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_size", CacheSize.parse(self.cache_size))
        for name in ("accelerator", "cpu_backend", "ggml_library", "gpu_backend", "profile", "host_store"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, valid: a name")
        accelerators.parse(self.accelerator)
        check_cpu(self.cpu_backend)
        check_gpu(self.gpu_backend)
        chosen = {name: getattr(self, name) for name in Strategy.names() if name in self.names()}
        _one_of("planner", self.planner, PLANNERS)
        if self.planner == "device" and self.policy == "adaptive":
            chosen["policy"] = "mrs"
        object.__setattr__(self, "strategy", Strategy(**chosen))
        if self.planner == "device":
            rules_of(self.strategy)
        if self.policy == "belady":
            raise ConfigError("policy belady must know the future: it is for `hybrimoe simulate`; give another")
        _in_range("cpu_threads", self.cpu_threads, 0, 1024)
        _in_range("max_chunk_tokens", self.max_chunk_tokens, 1, 65536)
        _one_of("host_store", self.host_store, HOST_STORES)
        for name in ("transfer_chunk_bytes", "prefill_streaming_bytes", "reserve_bytes", "card_bytes"):
            object.__setattr__(self, name, _num_bytes(name, getattr(self, name)))
        if self.transfer_chunk_bytes:
            _in_range("transfer_chunk_bytes", self.transfer_chunk_bytes, 4096, 2**40)
        if isinstance(self.deadline_s, bool) or not isinstance(self.deadline_s, (int, float)) or self.deadline_s <= 0:
            raise ConfigError(f"deadline_s is {self.deadline_s!r}, valid: seconds, more than 0")
        for name in ("fallback", "follow_pace"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}, valid: true or false")

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> ExpertOptions:
        """Build from a rule's kwargs or a command line; an unknown key is a ConfigError naming the nearest."""
        return cls(**_known(cls.names(), kwargs))

    def replace(self, kwargs: Mapping[str, Any]) -> ExpertOptions:
        """Return a copy with `kwargs` taking precedence, validated the same way."""
        return dataclasses.replace(self, **_known(self.names(), kwargs))

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, as `replace` takes it."""
        default = type(self)()
        return {name: value for name in self.names() if (value := getattr(self, name)) != getattr(default, name)}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every valid key."""
        return tuple(option.name for option in dataclasses.fields(cls) if option.init)


def _known(valid: tuple[str, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in kwargs:
        if key not in valid:
            raise ConfigError(f"unknown option {key!r}{nearest(key, valid) or ';'} valid: {', '.join(valid)}")
    return kwargs


def _num_bytes(option: str, value: Any) -> int:
    """Read a number of bytes or "2GiB"."""
    number = value
    if isinstance(value, str):
        number = int(value) if value.isdecimal() else parse_bytes(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ConfigError(f"{option} is {value!r}, valid: bytes (1048576, 1MiB)")
    return number


def _one_of(option: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(unknown_name(option, value, valid))


def _in_range(option: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{option} is {value!r}, valid: a whole number from {low} to {high}")
