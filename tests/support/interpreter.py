"""Triton's interpreter, mended where it does not go with the NumPy beside it, and in bfloat16.

Triton 3.6 turns a scalar into an index by `int(array)`, which NumPy 2.4 refuses for arrays of one element; from 3.7 on
it takes the element out first. Without this every kernel with a loop fails there, in tests only: on a device kernels
are compiled. Products of bfloat16, which NumPy does not know, multiply its bits as integers, in every version, and what
is made bfloat16 is cut off instead of rounded.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

__all__ = ["mend"]


def mend() -> None:
    """Whatever the version; nothing where there is no Triton, or it is built otherwise."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or hasattr(patch, "is_mended"):
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.squeeze()))

    patched.is_mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
    _mend_bfloat16(interpreter)


def _mend_bfloat16(interpreter: Any) -> None:
    builder, handle, language = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl
    dot, trunc = builder.create_dot, builder.create_fp_trunc

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_widened(each, handle, language) for each in (a, b)), *rest)

    def create_fp_trunc(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (language.float32, language.bfloat16):
            return trunc(self, source, kind)
        bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return handle(bits, language.bfloat16)

    builder.create_dot, builder.create_fp_trunc = create_dot, create_fp_trunc


def _widened(each: Any, handle: Any, language: Any) -> Any:
    """Float32 for bfloat16, whose bits are its upper half."""
    if each.dtype.scalar != language.bfloat16:
        return each
    return handle((each.data.astype(np.uint32) << 16).view(np.float32), language.float32)
