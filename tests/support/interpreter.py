"""Triton's interpreter, mended where it does not go with the NumPy beside it.

Triton 3.6 turns a scalar into an index by `int(array)`, which NumPy 2.4 refuses for arrays of one element; from 3.7 on
it takes the element out first. Without this every kernel with a loop fails there, in tests only: on a device kernels
are compiled.
"""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["mend"]


def mend() -> None:
    """Let scalars be indices, whatever the version; nothing where there is no Triton, or it is built otherwise."""
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
