"""On the path of each of SGLang's processes in tests: modules that do not load without a card have any name, empty.

Nothing of them is computed with: `--attention-backend torch_native` and float32 take none of SGLang's kernels on a CPU.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_VERSION = "0.28.0"


class _Anything:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Named(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Module(ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    __version__ = _VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (_Anything,), {})


class _StandIns(MetaPathFinder, Loader):
    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in self._names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def _install() -> None:
    absent = {"sgl_kernel"} if not Path("/dev/nvidiactl").exists() else set()
    if find_spec("torchvision") is None:
        absent.add("torchvision")
    sys.meta_path.insert(0, _StandIns(absent))


if not any(type(finder).__name__ == _StandIns.__name__ for finder in sys.meta_path):
    _install()
