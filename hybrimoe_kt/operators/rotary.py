"""`FusedRotary`: rotary positions whose queries and keys are turned in one launch.

The module named by rules makes angles, as the stock one does. Who turns by them is the attention, by a function that
its own module has as a global: each attention is given a copy of its `forward` to which that name means `Rotate`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.backends.row_asking import rotation_of
from hybrimoe_kt.backends.row_kernels import Rotation, check_kernel, is_used, rotate, takes_heads
from hybrimoe_kt.errors import ConfigError, HostCompatibilityError

from .adopted import Adopted

__all__ = ["FusedRotary", "Rotate", "RotatePairs", "latent_rotation"]

Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`turn(query, key, cos, sin, unsqueeze_dim=1)`, heads `[1, heads, T, W]`, as Transformers' families have it."""
_NAME = "apply_rotary_pos_emb"


class FusedRotary(Adopted):
    """In place of a model's rotary embedding: the same angles, and one launch a layer to turn by them."""

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str | None = None,
        kernel: str = "auto",
    ) -> None:
        """`kernel`: "triton", "torch", or "auto", which is Triton's on a GPU and torch's anywhere else."""
        self.check_kwargs({"kernel": kernel})
        if not type(orig_module).__name__.endswith("RotaryEmbedding"):
            raise ConfigError(f"{key}: FusedRotary replaces a rotary embedding, found {type(orig_module).__name__}")
        super().__init__(orig_module)
        self.kernel = kernel

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_kernel(kwargs.get("kernel", "auto"))

    def serve(self, attention: Any) -> bool:
        """Have an attention turn by `Rotate` from now on; False where it does it in some way not known here."""
        if hasattr(attention, "rotate_by"):
            attention.rotate_by(self.kernel)
            return True
        stock = getattr(attention, "stock", attention)
        forward = getattr(stock.forward, "__func__", None)
        copied = None if forward is None else _turning_by(forward, self.kernel)
        if copied is None:
            return False
        stock.forward = types.MethodType(copied, stock)
        return True


def _turning_by(forward: Any, kernel: str) -> Any | None:
    """A copy of `forward`, and of what decorates it, that calls `Rotate`; None where it calls no rotation."""
    code = getattr(forward, "__code__", None)
    if code is None:
        return None
    names, closure, own = forward.__globals__, forward.__closure__, None
    if _NAME in code.co_names:
        names = names | {_NAME: Rotate(names[_NAME], kernel)}
    else:  # from Transformers 5.24 on a decorator renames what it is given
        inner = getattr(forward, "__wrapped__", None)
        own = None if inner is None else _turning_by(inner, kernel)
        if own is None or all(cell.cell_contents is not inner for cell in closure or ()):
            return None
        closure = tuple(types.CellType(own) if cell.cell_contents is inner else cell for cell in closure)
    copied: Any = types.FunctionType(code, names, forward.__name__, forward.__defaults__, closure)
    copied.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copied, forward)
    del copied.__wrapped__
    if own is not None:
        copied.__wrapped__ = own
    return copied


class Rotate:
    """Turns queries and keys as `stock` does, whose way is found out by asking it; in one launch where a GPU is."""

    def __init__(self, stock: Turn, kernel: str = "auto") -> None:
        self.stock, self.kernel = stock, kernel

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads `[1, heads, T, W]` by `cos` and `sin [1, T, 2P]`, the angles twice; new tensors of the same shapes."""
        if unsqueeze_dim == 1 and is_used(self.kernel, q.device):
            rotation, half = rotation_of(self.stock), cos.shape[-1] // 2
            cos_once, sin_once = cos[..., :half], sin[..., :half]
            if rotation is not None and (rotation.is_wide or cos.dtype is q.dtype) and takes_heads(q, k, cos_once):
                return rotate(q, k, cos_once, sin_once, rotation)
        return self.stock(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


class RotatePairs:
    """DeepSeek-V2's: angles are complex numbers, float32, and neighbours are turned where they stand."""

    def __init__(self, stock: Turn, kernel: str) -> None:
        self.stock, self.kernel = stock, kernel

    def __call__(self, q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads `[1, heads, T, 2P]` by complex `angles [1, T, P]`; new tensors of the same shapes."""
        if is_used(self.kernel, q.device):
            cos, sin = torch.view_as_real(angles).unbind(-1)
            if takes_heads(q, k, cos):
                return rotate(q, k, cos, sin, Rotation(from_pairs=True, to_pairs=True, is_wide=True))
        return self.stock(q, k, angles)


def latent_rotation(module: nn.Module, kernel: str = "torch") -> Any:
    """Return `rotate(query, key, position_embeddings)` of the module's own family: they pair dimensions differently.

    `kernel` as of `FusedRotary`.
    """
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    if isinstance(module, v2.DeepseekV2Attention):
        return RotatePairs(v2.apply_rotary_emb, kernel)
    if isinstance(module, v3.DeepseekV3Attention):
        rotate = v3.apply_rotary_pos_emb_interleave if module.config.rope_interleave else v3.apply_rotary_pos_emb
        turn = Rotate(rotate, kernel)
        return lambda query, key, angles: turn(query, key, *angles)
    raise HostCompatibilityError(f"AbsorbedMLA knows DeepSeek-V2's and V3's attention, not {type(module).__name__}")
