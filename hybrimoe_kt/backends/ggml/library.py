"""The ggml library: found once, its version checked, its functions bound. Nothing else in the package calls C.

`libggml-python` carries ggml itself. Another build (with AVX-512, say) is named by `--ggml_library`: the directory of
libggml-base and libggml-cpu, or one library that has all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import threading
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from hybrimoe_kt.errors import HostCompatibilityError
from hybrimoe_kt.quants import TYPES, QuantType

__all__ = [
    "BF16",
    "DATA",
    "F16",
    "F32",
    "I32",
    "Q8_0",
    "SIZES",
    "STRIDES",
    "Context",
    "Library",
    "choose_library",
    "library",
    "unusable",
]

F32, F16, Q8_0, I32, BF16 = 0, 1, 8, 26, 30
"""Numbers of GGML types."""
_VERSIONS = (0, 15), (1, 0)
"""From the first on, before the second: the layout of a tensor and of a plan was compared with 0.20.2's and 0.23's."""
SIZES, STRIDES, DATA = 2, 6, 31
"""Where a tensor has its sizes, its strides and the pointer to its values, in words of 8 bytes, in every version above.

`_check_layout` finds out whether that holds.
"""
_BASE = ("libggml-base.so.0", "libggml-base.so", "libggml-base.dylib", "libggml-base.0.dylib", "ggml-base.dll")
_CPU = ("libggml-cpu.so.0", "libggml-cpu.so", "libggml-cpu.dylib", "libggml-cpu.0.dylib", "ggml-cpu.dll")
_FOLDERS = ("lib64", "lib", "bin", ".")

_Tensor, _Graph = c_void_p, c_void_p


class _Init(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Plan(ctypes.Structure):
    """ggml_cplan: threads and scratch memory of a graph; longer than any version's, as the library writes it."""

    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


class PoolParameters(ctypes.Structure):
    """ggml_threadpool_params."""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class _CpuTraits(ctypes.Structure):
    _fields_ = (("from_float", c_void_p), ("vec_dot", c_void_p), ("vec_dot_type", c_int), ("nrows", c_int64))


_ONE, _TWO, _THREE = (c_void_p, _Tensor), (c_void_p, _Tensor, _Tensor), (c_void_p, _Tensor, _Tensor, _Tensor)
_SIZES = (c_int64, c_int64, c_int64, c_int64)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (c_char_p, ()),
    "ggml_init": (c_void_p, (_Init,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_graph_custom": (_Graph, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (_Graph, _Tensor)),
    "ggml_new_tensor": (_Tensor, (c_void_p, c_int, c_int, POINTER(c_int64))),
    "ggml_get_data": (c_void_p, (_Tensor,)),
    "ggml_nbytes": (c_size_t, (_Tensor,)),
    "ggml_mul_mat": (_Tensor, _TWO),
    "ggml_mul_mat_id": (_Tensor, _THREE),
    "ggml_out_prod": (_Tensor, _TWO),
    "ggml_add_id": (_Tensor, _THREE),
    "ggml_swiglu_split": (_Tensor, _TWO),
    "ggml_swiglu_oai": (_Tensor, (*_TWO, c_float, c_float)),
    "ggml_geglu_split": (_Tensor, _TWO),
    "ggml_geglu_erf_split": (_Tensor, _TWO),
    "ggml_gelu": (_Tensor, _ONE),
    "ggml_gelu_erf": (_Tensor, _ONE),
    "ggml_relu": (_Tensor, _ONE),
    "ggml_sqr": (_Tensor, _ONE),
    "ggml_scale_bias": (_Tensor, (*_ONE, c_float, c_float)),
    "ggml_mul": (_Tensor, _TWO),
    "ggml_add": (_Tensor, _TWO),
    "ggml_div": (_Tensor, _TWO),
    "ggml_scale": (_Tensor, (*_ONE, c_float)),
    "ggml_clamp": (_Tensor, (*_ONE, c_float, c_float)),
    "ggml_rms_norm": (_Tensor, (*_ONE, c_float)),
    "ggml_sigmoid": (_Tensor, _ONE),
    "ggml_tanh": (_Tensor, _ONE),
    "ggml_silu": (_Tensor, _ONE),
    "ggml_softplus": (_Tensor, _ONE),
    "ggml_repeat_4d": (_Tensor, (*_ONE, *_SIZES)),
    "ggml_gated_delta_net": (_Tensor, (*_THREE, *[_Tensor] * 3, c_int64)),
    "ggml_sum_rows": (_Tensor, _ONE),
    "ggml_top_k": (_Tensor, (*_ONE, c_int)),
    "ggml_get_rows": (_Tensor, _TWO),
    "ggml_soft_max_ext": (_Tensor, (*_TWO, c_float, c_float)),
    "ggml_soft_max_add_sinks": (None, (_Tensor, _Tensor)),
    "ggml_flash_attn_ext": (_Tensor, (*_THREE, _Tensor, c_float, c_float, c_float)),
    "ggml_flash_attn_ext_add_sinks": (None, (_Tensor, _Tensor)),
    "ggml_rope_ext": (_Tensor, (*_THREE, *[c_int] * 3, *[c_float] * 6)),
    "ggml_concat": (_Tensor, (*_TWO, c_int)),
    "ggml_cpy": (_Tensor, _TWO),
    "ggml_cont": (_Tensor, _ONE),
    "ggml_permute": (_Tensor, (*_ONE, *[c_int] * 4)),
    "ggml_reshape_4d": (_Tensor, (*_ONE, *_SIZES)),
    "ggml_view_3d": (_Tensor, (*_ONE, *_SIZES[:3], c_size_t, c_size_t, c_size_t)),
    "ggml_view_4d": (_Tensor, (*_ONE, *_SIZES, *[c_size_t] * 4)),
    "ggml_cast": (_Tensor, (*_ONE, c_int)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_threadpool_params_default": (PoolParameters, (c_int,)),
    "ggml_threadpool_new": (c_void_p, (POINTER(PoolParameters),)),
    "ggml_graph_plan": (Plan, (_Graph, c_int, c_void_p)),
    "ggml_graph_compute": (c_int, (_Graph, POINTER(Plan))),
    "ggml_get_type_traits_cpu": (POINTER(_CpuTraits), (c_int,)),
    "ggml_cpu_init": (None, ()),
}
_INSTRUCTIONS = (
    "avx",
    "avx2",
    "avx_vnni",
    "avx512",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "neon",
    "dotprod",
    "sve",
)


class Library:
    """ggml's functions by their own names, with argument types."""

    def __init__(self, handles: list[ctypes.CDLL], file: str, named: str) -> None:
        """HostCompatibilityError for a library that lacks a function, or is of another version.

        `named` is how the user named it; "" for the packaged one.
        """
        self.file, self.named, self._handles = file, named, handles
        for name, (result, arguments) in _FUNCTIONS.items():
            setattr(self, name, self._bound(name, result, arguments))
        self.version: str = self.ggml_version().decode()
        number = tuple(int(part) for part in self.version.split(".")[:2] if part.isdigit())
        if not _VERSIONS[0] <= number < _VERSIONS[1]:
            raise HostCompatibilityError(f"{file} is ggml {self.version}; {_known_versions()} are known here")
        self.ggml_cpu_init()
        self._check_layout()

    def __getattr__(self, name: str) -> Any:  # for type checkers: functions are attributes
        raise AttributeError(name)

    def _bound(self, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
        found = self._found(name)
        if found is None:
            raise HostCompatibilityError(f"{self.file} has no {name}; libggml-python 0.20.2 has")
        found.restype, found.argtypes = result, list(arguments)
        return found

    def _found(self, name: str) -> Any:
        return next((found for handle in self._handles if (found := getattr(handle, name, None)) is not None), None)

    def _check_layout(self) -> None:
        """Find out that a tensor's values, sizes and strides are where this module writes them."""
        with Context(self, 1, 4096, has_values=True) as context:
            tensor = context.tensor(F32, 8, 3)
            found = (c_int64 * 32).from_address(tensor)
            sizes, strides = found[SIZES : SIZES + 4], found[STRIDES : STRIDES + 4]
            is_known = found[DATA] == self.ggml_get_data(tensor)
            if not is_known or sizes != [8, 3, 1, 1] or strides != [4, 32, 96, 96]:
                raise HostCompatibilityError(f"{self.file} (ggml {self.version}) lays out tensors in an unknown way")

    @functools.cached_property
    def instructions(self) -> tuple[str, ...]:
        """What it was built for, of what speeds products up: ("avx", "avx2")."""
        asked = ((name, self._found(f"ggml_cpu_has_{name}")) for name in _INSTRUCTIONS)
        return tuple(name for name, has in asked if has is not None and has())

    @functools.cached_property
    def types(self) -> tuple[QuantType, ...]:
        """The types whose products it computes."""
        return tuple(row for row in TYPES.values() if self._computes(row))

    def _computes(self, row: QuantType) -> bool:
        if row.dtype is None and (row.block_values == 1 or row.name in ("Q8_1", "Q8_K")):
            return False  # integers, and what activations alone are rounded to
        return bool(self.ggml_get_type_traits_cpu(row.number).contents.vec_dot)


class Context:
    """Memory of ggml's own for a few tensors and one graph; values stay outside it."""

    def __init__(
        self, of: Library, num_tensors: int, num_bytes: int = 0, *, has_values: bool = False, num_nodes: int = 32
    ) -> None:
        """`num_nodes`: what its graph has at most."""
        self.library, self._num_nodes = of, num_nodes
        graph = of.ggml_graph_overhead_custom(num_nodes, False)
        size = (num_tensors + 1) * of.ggml_tensor_overhead() + graph + num_bytes
        self._pointer: int | None = of.ggml_init(_Init(size, None, not has_values))
        if self._pointer is None:
            raise MemoryError("ggml got no memory for a graph")

    @property
    def pointer(self) -> int:
        assert self._pointer is not None, "in use until it is closed"
        return self._pointer

    def tensor(self, ggml_type: int, *sizes: int) -> int:
        """A tensor of up to four dimensions, the innermost first."""
        shape = (c_int64 * len(sizes))(*sizes)
        tensor: int = self.library.ggml_new_tensor(self.pointer, ggml_type, len(sizes), shape)
        return tensor

    def graph(self, *results: int) -> int:
        """What computes these tensors from those that nothing computes."""
        graph: int = self.library.ggml_new_graph_custom(self.pointer, self._num_nodes, False)
        for result in results:
            self.library.ggml_build_forward_expand(graph, result)
        return graph

    def close(self) -> None:
        """Give the memory back; no tensor or graph of it may be used any more."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self.library.ggml_free(pointer)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # at the interpreter's end, or where making it failed
            self.close()


def data_of(tensor: int) -> c_void_p:
    """The field of a tensor that points to its values; assign to its `value`."""
    return c_void_p.from_address(tensor + 8 * DATA)


_opened: list[Library] = []
_lock = threading.Lock()


def choose_library(path: str) -> None:
    """Use this build of ggml from now on, "" the packaged one; HostCompatibilityError if it cannot be used.

    Or if the process computes with another already: what was made with one must not meet the other.
    """
    with _lock:
        if _opened and path and _opened[0].named != path:
            raise HostCompatibilityError(
                f"ggml_library is {path!r}, but this process computes with {_opened[0].file} already; name it first"
            )
        if path and not _opened:
            _opened.append(_open(path))


def library() -> Library:
    """The library; HostCompatibilityError, one sentence, where there is none that can be used."""
    if _opened:
        return _opened[0]
    with _lock:
        if not _opened:
            _opened.append(_open(""))
        return _opened[0]


def unusable() -> str | None:
    """Return why products cannot be computed by ggml here, None when they can."""
    try:
        library()
    except HostCompatibilityError as error:
        return str(error)
    return None


def _open(path: str) -> Library:
    place = Path(path).expanduser() if path else _packaged()
    if place.is_file():
        return Library([_loaded(place)], str(place), path)
    folder = next((place / name for name in _FOLDERS if _first(place / name, _BASE) is not None), None)
    if folder is None:
        raise HostCompatibilityError(
            f"{place} is no ggml library, nor a directory with {_BASE[0]}; --ggml_library takes either"
        )
    base, cpu = _first(folder, _BASE), _first(folder, _CPU)
    if base is None or cpu is None:
        raise HostCompatibilityError(f"{folder} has {_BASE[0]} but no {_CPU[0]}")
    return Library([_loaded(base), _loaded(cpu)], str(folder), path)


def _packaged() -> Path:
    found = importlib.util.find_spec("libggml")
    if found is None or not found.submodule_search_locations:
        raise HostCompatibilityError(
            "the ggml CPU backend needs the package libggml-python; install it with `pip install libggml-python`"
        )
    return Path(found.submodule_search_locations[0])


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _loaded(file: Path) -> ctypes.CDLL:
    """Load a library for this module alone: another ggml in the process, llama.cpp's, keeps its own functions."""
    try:
        if hasattr(os, "add_dll_directory"):  # Windows, which does not look beside a library for what it needs
            os.add_dll_directory(str(file.parent.resolve()))
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise HostCompatibilityError(f"{file} cannot be loaded: {error}") from None


def _known_versions() -> str:
    return " to ".join(".".join(map(str, version)) for version in _VERSIONS)
