"""What a model has to do with fixed steps: tokens whose step reads and writes the same memory every time."""

from __future__ import annotations

from torch import nn

from hybrimoe_kt.backends.decode_attention import DeviceAttention, attention_on
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.operators.pending_sum import sums_may_wait

__all__ = ["attention_of", "experts_of", "kernels_of", "layers_read_as_kept", "refusal", "sums_may_wait"]


def refusal(model: nn.Module, *, is_divided: bool) -> str | None:
    """Why no step of the model can be fixed, whatever its cache; None if one can. `is_divided`: over devices."""
    if is_divided:
        return "the layers are divided over several devices"
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    if "chunked_attention" in kinds:
        return "its attention goes by chunks of positions, which are counted on the host"
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | AbsorbedMLA) and module.asks_ggml:
            return f"ggml computes {name}"
        if isinstance(module, DecodeAttention) and module.refusal is not None:
            return f"{name}: {module.refusal}"
    return None


def experts_of(model: nn.Module) -> list[HybriMoEExperts]:
    """Every layer's experts."""
    return [module for module in model.modules() if isinstance(module, HybriMoEExperts)]


def attention_of(model: nn.Module) -> list[DeviceAttention]:
    """Who attends in fixed steps, each once; they are told of every step."""
    device = next(model.parameters()).device
    return [attention_on(device, kernel) for kernel in sorted(kernels_of(model))]


def kernels_of(model: nn.Module) -> set[str]:
    """By what kernels its layers attend in fixed steps, as rules name them."""
    return {each.kernel for each in model.modules() if isinstance(each, DecodeAttention | AbsorbedMLA)}


def layers_read_as_kept(model: nn.Module) -> frozenset[int]:
    """Numbers of the layers whose attention takes keys and values in whatever dtype they are kept, in a fixed step."""
    ours = (each for each in model.modules() if isinstance(each, DecodeAttention | AbsorbedMLA))
    return frozenset(each.layer_idx for each in ours)
