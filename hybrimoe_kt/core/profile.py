"""A hardware profile: the measured or published numbers behind every predicted second.

A profile is one JSON file. Units stand in the key names, every number carries its source, and a machine
without a GPU leaves out every `gpu_` and `link_` number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hybrimoe_kt.errors import ConfigError, nearest

_TEXT_KEYS = ("hardware", "date", "measured")
_MAY_BE_ZERO = frozenset(
    {"cpu_call_s", "cpu_expert_s", "gpu_call_s", "gpu_layer_s", "cpu_layer_s", "link_latency_s", "step_overhead_s"}
)


@dataclass(frozen=True, slots=True)
class Profile:
    """Cost coefficients of one machine, per byte and per multiply-accumulate so that they fit any model.

    `cpu_single_bytes_per_s` is the rate at which the CPU reads an expert that has one token (a path of its
    own in every CPU kernel); with more tokens an expert costs `cpu_expert_s + bytes / cpu_bytes_per_s` once
    plus `macs / cpu_macs_per_s` per token. `cpu_call_s` is paid once per set of experts. The GPU costs
    `gpu_call_s` per expert plus the larger of reading its bytes and doing its arithmetic. While the link is
    busy, CPU work takes `cpu_slowdown_while_link_busy` times as long. `*_layer_s` is the time per decoder
    layer that no byte or arithmetic explains (kernel launches, synchronisation).
    """

    name: str
    hardware: str
    date: str
    measured: str
    num_cpu_cores: int
    cpu_call_s: float
    cpu_expert_s: float
    cpu_single_bytes_per_s: float
    cpu_bytes_per_s: float
    cpu_macs_per_s: float
    cpu_layer_s: float
    cpu_slowdown_while_link_busy: float = 1.0
    gpu_call_s: float | None = None
    gpu_bytes_per_s: float | None = None
    gpu_macs_per_s: float | None = None
    gpu_layer_s: float | None = None
    link_latency_s: float | None = None
    link_bytes_per_s: float | None = None
    link_chunk_bytes: float | None = None
    """Smallest copy that still uses the link well; how finely prefetches are cut."""
    step_overhead_s: float = 0.0
    """Host time of a layer step before its work is under way and after it has ended."""
    source: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    """What it was measured on, as `hybrimoe calibrate` names machines; empty for profiles that fit any."""
    cpu_backends: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """CPU backend -> tokens of an expert -> seconds of one expert in one call, where several were compared."""

    @property
    def has_gpu(self) -> bool:
        """Whether the profile describes a GPU and a link to it."""
        return self.gpu_bytes_per_s is not None


_OPTIONAL_TEXT_KEYS = ("machine",)
_COMPARED = "cpu_backends"
_NUMBER_KEYS = tuple(
    f.name for f in fields(Profile) if f.name not in (*_TEXT_KEYS, *_OPTIONAL_TEXT_KEYS, "name", "source", _COMPARED)
)
_OPTIONAL_NUMBER_KEYS = ("cpu_slowdown_while_link_busy", "link_chunk_bytes", "step_overhead_s")
_GPU_KEYS = tuple(key for key in _NUMBER_KEYS if key.startswith(("gpu_", "link_")) and key not in _OPTIONAL_NUMBER_KEYS)
_REQUIRED = tuple(key for key in _NUMBER_KEYS if key not in (*_GPU_KEYS, *_OPTIONAL_NUMBER_KEYS))
_ALL_KEYS = (*_TEXT_KEYS, *_OPTIONAL_TEXT_KEYS, *_NUMBER_KEYS, _COMPARED, "source")


def parse_profile(content: str, *, name: str, file: str) -> Profile:
    """Return the profile in the JSON text `content`; errors name `file` and the offending key."""
    try:
        data = json.loads(content)
    except json.JSONDecodeError as error:
        raise ConfigError(f"profile {file}:{error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ConfigError(f"profile {file}: nests too deeply to be a profile") from None
    if not isinstance(data, dict):
        raise ConfigError(f"profile {file}: must be a JSON object with the keys {', '.join(_ALL_KEYS)}")
    _check_keys(data, file)
    numbers = {key: _number(data[key], key, file) for key in _NUMBER_KEYS if key in data}
    numbers["num_cpu_cores"] = int(numbers["num_cpu_cores"])
    texts = {key: _text(data[key], key, file) for key in (*_TEXT_KEYS, *_OPTIONAL_TEXT_KEYS) if key in data}
    compared = _compared(data.get(_COMPARED, {}), file)
    return Profile(name=name, **texts, **numbers, source=_sources(data, file), cpu_backends=compared)  # type: ignore[arg-type]


def _check_keys(data: Mapping[str, Any], file: str) -> None:
    for key in data:
        if key not in _ALL_KEYS:
            hint = nearest(key, _ALL_KEYS) or f"; valid: {', '.join(_ALL_KEYS)}"
            raise ConfigError(f"profile {file}: unknown key {key!r}{hint}")
    required = (*_TEXT_KEYS, *_REQUIRED, "source")
    if any(key in data for key in _GPU_KEYS):
        required += _GPU_KEYS
    for key in required:
        if key not in data:
            raise ConfigError(f"profile {file}: missing key {key!r}; add it (no GPU: no gpu_, link_ keys)")


def _number(value: object, key: str, file: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"profile {file}: {key} is {value!r}; give a finite number")
    if value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
        raise ConfigError(f"profile {file}: {key} is {value!r}; it must be {'>= 0' if key in _MAY_BE_ZERO else '> 0'}")
    if key == "cpu_slowdown_while_link_busy" and value < 1:
        raise ConfigError(f"profile {file}: {key} is {value!r}; it must be >= 1 (1 = no contention)")
    if key == "num_cpu_cores" and value != int(value):
        raise ConfigError(f"profile {file}: {key} is {value!r}; give a whole number")
    return float(value)


def _compared(value: object, file: str) -> Mapping[str, Mapping[int, float]]:
    wanted = f"profile {file}: {_COMPARED} must map each backend to seconds by number of tokens"
    if not isinstance(value, dict) or not all(isinstance(times, dict) for times in value.values()):
        raise ConfigError(wanted)
    if not all(load.isdecimal() and int(load) > 0 for times in value.values() for load in times):
        raise ConfigError(f"{wanted}, which are whole and more than 0")
    return {
        name: {int(load): _number(seconds, f"{_COMPARED}.{name}.{load}", file) for load, seconds in times.items()}
        for name, times in value.items()
    }


def _text(value: object, key: str, file: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"profile {file}: {key} is {value!r}; give a non-empty text")
    return value


def _sources(data: Mapping[str, Any], file: str) -> Mapping[str, str]:
    sources = data["source"]
    if not isinstance(sources, dict):
        raise ConfigError(f"profile {file}: source must map each number's key to where it comes from")
    for key in sources:
        if key not in _NUMBER_KEYS:
            hint = nearest(key, _NUMBER_KEYS) or f"; valid: {', '.join(_NUMBER_KEYS)}"
            raise ConfigError(f"profile {file}: source names unknown key {key!r}{hint}")
    for key in _NUMBER_KEYS:
        if key in data and key not in sources:
            raise ConfigError(f"profile {file}: source says nothing about {key!r}; every number needs its origin")
    return {key: _text(text, f"source of {key}", file) for key, text in sources.items()}
