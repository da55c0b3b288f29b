"""Which device each layer's dense weights stand on, and the hidden states' way from one to the next.

A rule's `generate_device` places a module. A decoder layer stands on one device as a whole; between two of them the
hidden states cross once, and what all layers share (rotary angles, masks) once per device and step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.accelerators import numbered
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.host.rules.injection import Injection, holds_weights
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.pending_sum import PendingSum

__all__ = ["Crossings", "Placement", "place_modules"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Module path -> place, in the order a step passes them; places are device names, or emulated accelerators'."""

    places: Mapping[str, str]
    default: str

    @property
    def is_split(self) -> bool:
        return len(set(self.places.values())) > 1

    @property
    def device_map(self) -> dict[str, str]:
        """What Transformers' loading takes: module path -> torch device."""
        devices = {path: str(device_at(place)) for path, place in self.places.items()}
        if len(set(devices.values())) > 1:
            return devices
        return {"": next(iter(devices.values()), str(device_at(self.default)))}

    def place_of(self, parameter: str) -> str:
        """Where a parameter stands, by its full name."""
        unit = _unit_of(parameter, self.places)
        return self.places[unit] if unit is not None else self.default

    def device_of(self, parameter: str) -> torch.device:
        """The torch device of a parameter, by its full name."""
        return device_at(self.place_of(parameter))


def place_modules(
    model: nn.Module, injections: Mapping[str, Injection], default: str
) -> tuple[Placement, Injection | None]:
    """Return where the rules put what of `model`, and a decision that cannot be followed here, if there is one.

    `model` is as Transformers built it. Devices this machine lacks become `default`. ConfigError where the dense
    weights of one layer are to be divided.
    """
    given = numbered(default)
    if given is not None and given.number is None and given.torch_type != "cpu":
        default = f"{default}:0"
    lacking: Injection | None = None
    places: dict[str, str] = {}
    for path, module in _units(model):
        named: dict[str, Injection] = {}
        for injection in _deciding(path, module, injections):
            place = _place(injection.kwargs.get("generate_device"), default)
            if place is None:
                lacking, place = lacking or injection, default
            named.setdefault(place, injection)
        if len(named) > 1:
            rule = next(item.rule for item in reversed(named.values()) if item.rule is not None)
            raise rule.error(f"{path} would be divided between {' and '.join(named)}; a layer stands on one device")
        places[path] = next(iter(named), default)
    _keep_tied_together(model, places)
    return Placement(places, default), lacking


def _units(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """What is placed as a whole: each decoder layer, and what stands before and after them."""
    for name, child in model.named_children():
        layers = getattr(child, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            yield name, child
            continue
        for part, module in child.named_children():
            if part == "layers":
                yield from ((f"{name}.layers.{number}", layer) for number, layer in enumerate(layers))
            else:
                yield f"{name}.{part}", module


def _deciding(path: str, unit: nn.Module, injections: Mapping[str, Injection]) -> Iterable[Injection]:
    """What was decided for the modules of a unit that hold dense weights."""
    for name, injection in injections.items():
        if name != path and not name.startswith(f"{path}."):
            continue
        if injection.cls.endswith(f".{HybriMoEExperts.__name__}"):
            continue
        if holds_weights(unit.get_submodule(name[len(path) + 1 :]), recurse=not injection.recursive):
            yield injection


def _place(name: str | None, default: str) -> str | None:
    """The place a rule means by `name`; None if this machine has no such device."""
    if name is None or name == default or (name != "cpu" and name == device_at(default).type):
        return default
    device = numbered(name)
    if name == "cpu" or (device is not None and device.torch_type == "cpu"):
        return name
    if device is None:
        return None
    module = getattr(torch, device.torch_type)
    if not module.is_available() or (device.number or 0) >= module.device_count():
        return None
    return name if device.number is not None else f"{name}:0"


def _keep_tied_together(model: nn.Module, places: dict[str, str]) -> None:
    """Tied weights exist once: what borrows them stands where their owner does."""
    for borrower, owner in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        here, there = (_unit_of(name, places) for name in (borrower, owner))
        if here is not None and there is not None:
            places[here] = places[there]


def _unit_of(name: str, places: Mapping[str, str]) -> str | None:
    return next((path for path in places if name.startswith(f"{path}.")), None)


class Crossings:
    """Brings every module's inputs to where it stands, each tensor once per step.

    `num_crossings` counts how often the hidden states went from one place to another since the start.
    """

    def __init__(self, model: nn.Module, placement: Placement) -> None:
        self.num_crossings = 0
        self._at: str | None = None
        self._brought: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        model.register_forward_pre_hook(lambda *_: self.forget())
        model.register_forward_hook(lambda *_: self.forget())
        for path, place in placement.places.items():
            carries_hidden = not path.endswith("rotary_emb")
            model.get_submodule(path).register_forward_pre_hook(
                self._hook(place, carries_hidden), with_kwargs=True, prepend=True
            )

    def forget(self) -> None:
        """Let go of what a step brought along: between two steps, and when one has failed half-way."""
        self._at = None
        self._brought.clear()

    def _hook(self, place: str, carries_hidden: bool) -> Any:
        device = device_at(place)

        def bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if carries_hidden:
                self.num_crossings += self._at not in (None, place)
                self._at = place
            return self._move(args, device), self._move(kwargs, device)

        return bring

    def _move(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, PendingSum):
            value = value.total
        if isinstance(value, torch.Tensor):
            return value if value.device == device else self._once(value, device)
        if type(value) in (tuple, list):
            return type(value)(self._move(item, device) for item in value)
        if type(value) is dict:
            return {name: self._move(item, device) for name, item in value.items()}
        return value

    def _once(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        key = id(tensor), device
        known = self._brought.get(key)
        if known is None:  # the original is kept, so that its id is nobody else's until the step ends
            # A copy to the host must have arrived before the host computes with it.
            known = self._brought[key] = tensor, tensor.to(device, non_blocking=device.type != "cpu")
        return known[1]
