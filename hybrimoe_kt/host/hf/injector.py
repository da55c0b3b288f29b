"""Puts operators into a model as the rules say: which, where it stands, and with what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hybrimoe_kt.backends.ggml.library import choose_library
from hybrimoe_kt.backends.gpu_dense import can_multiply
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.errors import RuleError
from hybrimoe_kt.host.rules import injection as rule_engine
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from hybrimoe_kt.operators.embedding import QuantizedEmbedding
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.layer_ggml import GgmlLayer
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.operators.moe_block import MoEBlock
from hybrimoe_kt.operators.norm import FusedRMSNorm
from hybrimoe_kt.operators.rotary import FusedRotary
from hybrimoe_kt.operators.router import FusedRouter
from hybrimoe_kt.operators.weighed_input import WeighedInputBlock
from hybrimoe_kt.runtime import ModelExperts
from hybrimoe_kt.weights.checkpoint_experts import CheckpointLoader
from hybrimoe_kt.weights.gguf_loader import GgufLoader

from .architectures import Architecture
from .placement import Placement, place_modules

__all__ = ["Injector"]

logger = logging.getLogger(__name__)

_PLACED = QuantizedLinear, QuantizedEmbedding, AbsorbedMLA, DecodeAttention, GgmlLayer
"""What asks where it will stand: weights stay as the file has them, and ggml or the accelerator's kernels compute."""

_OF_ROWS = FusedRMSNorm, FusedRouter, FusedRotary
_TORCHS = "torch", "torch_reference"


class Injector:
    """Puts operators into a model as the rules say, and keeps what it decided for the last one it was given."""

    def __init__(
        self,
        rules_file: Path,
        loader: GgufLoader | CheckpointLoader,
        device: str,
        overrides: Mapping[str, Any],
        kv_cache_type: str | None,
        *,
        family: Architecture | None = None,
        tries_kernels: bool = True,
    ) -> None:
        """`device` holds what no rule places elsewhere; an accelerator by name in `overrides` takes all layers.

        `family` says what its MoE blocks are.
        `tries_kernels`: a GPU whose kernels cannot be built, for want of a compiler, gets floats, with a warning.
        """
        self._kv_cache_type, self._tries_kernels = kv_cache_type, tries_kernels
        self._family = family
        self._rules_file, self._rules = rules_file, rule_engine.load_rules(rules_file)
        self._loader, self._device, self._overrides = loader, device, overrides
        named = [overrides, *(rule.kwargs for rule in self._rules.rules)]
        choose_library(str(next((options["ggml_library"] for options in named if "ggml_library" in options), "")))
        self.experts = ModelExperts()
        self.placement = Placement({}, device)
        self.warnings: list[str] = []

    def __call__(self, model: nn.Module) -> None:
        injections = rule_engine.match_modules(model, self._rules, default_device=self._device)
        self.warnings = [
            f"{self._rules_file}:{rule.line}: rule {rule.number} matches no module of this model"
            for rule in rule_engine.unused_rules(self._rules, injections)
        ]
        self.placement = self._placed(model, injections)
        self.experts = ModelExperts(overrides=self._overrides)
        rule_engine.inject(model, injections, gguf_loader=self._loader, config=model.config, construct=self._construct)
        _check_weighed(model, self._rules_file)
        _untie_packed(model)
        _serve_rotary(model)

    def _construct(self, cls: type[nn.Module], **contract: Any) -> nn.Module:
        if issubclass(cls, HybriMoEExperts):
            return cls(**contract, experts=self.experts)
        if issubclass(cls, MoEBlock):
            return self._block(cls, contract)
        if issubclass(cls, WeighedInputBlock) and not hasattr(contract["orig_module"], "experts"):
            dense: nn.Module = contract["orig_module"]
            return dense
        if issubclass(cls, _PLACED):
            place = self.placement.place_of(f"{contract['key']}.weight")
            kept = {"kv_cache_type": self._kv_cache_type} if self._kv_cache_type and issubclass(cls, GgmlLayer) else {}
            return cls(**self._arithmetic(cls, place) | contract | {"generate_device": place} | kept)
        if issubclass(cls, _OF_ROWS) and self._overrides.get("gpu_backend") in _TORCHS:
            return cls(**{"kernel": "torch"} | contract)
        return cls(**contract)

    def _block(self, cls: type[MoEBlock], contract: dict[str, Any]) -> nn.Module:
        stock, family = contract["orig_module"], self._family
        shared_name = family.shared_experts.get(type(stock).__name__, "") if family is not None else ""
        if family is None or getattr(stock, shared_name, None) is None:
            return self._left_alone(stock)
        return cls(**contract | {"shared_name": shared_name, "router_inputs": family.router_inputs})

    def _left_alone(self, block: nn.Module) -> nn.Module:
        """What a rule gives to MoEBlock and stays itself: dense layers, and with a warning what should be a block."""
        if hasattr(block, "experts"):
            told = f"{type(block).__name__} stays as it is: MoEBlock knows no shared experts in it"
            self.warnings += [told] if told not in self.warnings else []
        return block

    def _arithmetic(self, cls: type[nn.Module], place: str) -> dict[str, str]:
        """Who multiplies on an accelerator where no rule says it: as the options say of the experts there.

        Where these are torch's, dense weights of a real device are floats, which torch multiplies fast.
        """
        if not issubclass(cls, QuantizedLinear | AbsorbedMLA):
            return {}
        named, device = str(self._overrides.get("gpu_backend", "auto")), device_at(place)
        if named == "triton":
            return {"gpu": named}
        if device.type == "cpu":
            return {}
        if named in _TORCHS:
            return {"gpu": "float"}
        return {"gpu": "float"} if self._tries_kernels and not can_multiply(device) else {}

    def _placed(self, model: nn.Module, injections: Mapping[str, rule_engine.Injection]) -> Placement:
        device = self._device
        placement, lacking = place_modules(model, injections, device)
        if self._overrides.get("accelerator", "auto") != "auto" and placement.is_split:
            self.warnings.append(
                f"{self._rules_file} divides the layers; with --accelerator they all stand on {device}"
            )
            placement = Placement(dict.fromkeys(placement.places, device), device)
        if lacking is not None:
            self.warnings.append(_lacking_device(lacking, device))
        return placement


def _check_weighed(model: nn.Module, rules_file: Path) -> None:
    """RuleError where our experts stand in a stock block that hands them every token for every expert."""
    for name, module in model.named_modules():
        if type(module).__name__ == WeighedInputBlock.REPLACES and isinstance(module.experts, HybriMoEExperts):
            raise RuleError(
                f"{name}: HybriMoEExperts within {type(module).__name__} need a rule that gives the block to "
                f"{WeighedInputBlock.__module__}.{WeighedInputBlock.__name__}",
                file=rules_file,
            )


def _untie_packed(model: nn.Module) -> None:
    """Forget that a head without floats shares the embedding's, or that it could: both then read the same tensor."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    stored = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, owner in list(tied.items()):
        if name not in stored or owner not in stored:
            del tied[name]


def _serve_rotary(model: nn.Module) -> None:
    """Let every attention turn its heads as the model's rotary operator does, where rules name one."""
    rotary = next((module for module in model.modules() if isinstance(module, FusedRotary)), None)
    body: Any = model
    for layer in body.model.layers if rotary is not None else ():
        attention = getattr(layer, "self_attn", None)
        if attention is not None and rotary is not None and not rotary.serve(attention):
            logger.info("%s turns its heads in a way of its own", type(attention).__name__)


def _lacking_device(injection: rule_engine.Injection, device: str) -> str:
    rule, named = injection.rule, injection.kwargs["generate_device"]
    assert rule is not None, "what no rule decides is on the default device"
    return f"rule {rule.number} (line {rule.line}) names {named}, which this machine lacks; taken as {device}"
