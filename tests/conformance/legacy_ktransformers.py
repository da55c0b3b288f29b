"""Finds a legacy kTransformers source tree outside the repository and loads its rule engine as an oracle.

Looked for in this order: the environment variable HYBRIMOE_KTRANSFORMERS (a folder that holds `ktransformers/`, such as
an unpacked release or the `archive` folder of a checkout), an installed `ktransformers` that still has its engine, and
what `python tests/conformance/legacy_ktransformers.py` has put into `.cache/ktransformers`: that command fetches
the source distribution of the last release with a full framework from the package index.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

RELEASE = "0.2.1.post1"
CACHE = Path(__file__).parents[2] / ".cache" / "ktransformers"
ENGINE = Path("ktransformers", "optimize", "optimize.py")
MISSING = f"no legacy kTransformers source: set HYBRIMOE_KTRANSFORMERS or run python {Path(__file__).name}"

# The release's build asks for a CUDA toolkit even when it compiles nothing; these files answer its questions.
BUILD_STAND_INS = {
    "torch/__init__.py": "from . import version\n__version__ = '2.3.0'\n"
    "class cuda:\n    is_available = staticmethod(lambda: False)\nxpu = cuda\n",
    "torch/version.py": "cuda, hip = '99.9', None\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "import os\nfrom setuptools import Extension\n"
    "from setuptools.command.build_ext import build_ext\nCUDA_HOME = os.environ['CUDA_HOME']\n"
    "class BuildExtension(build_ext):\n    def run(self):\n        pass\n"
    "def CUDAExtension(name, *args, **kwargs):\n    return Extension(name, [])\n",
    "cpufeature/__init__.py": "",
    "cpufeature/extension.py": "CPUFeature = {'AVX2': True, 'AVX512f': False}\n",
    "bin/nvcc": "#!/bin/sh\necho 'Cuda compilation tools, release 99.9, V99.9.0'\n",
}


@dataclass(frozen=True)
class LegacyEngine:
    """Upstream's two functions and the folder of its rule files."""

    gen_optimize_config: Callable[..., None]
    inject: Callable[..., None]
    rules: Path


def find() -> Path | None:
    """Return the folder that holds `ktransformers/optimize/optimize.py`, None when there is none."""
    spec = importlib.util.find_spec("ktransformers")
    installed = [Path(folder).parent for folder in spec.submodule_search_locations or ()] if spec else []
    named = os.environ.get("HYBRIMOE_KTRANSFORMERS")
    candidates = [*([Path(named)] if named else []), *installed, CACHE]
    return next((folder for folder in candidates if (folder / ENGINE).is_file()), None)


def load(root: Path) -> LegacyEngine:
    """Execute upstream's engine with stand-ins for the GGUF reader and the loader that it imports beside itself."""
    stand_ins = {
        "ktransformers": {},
        "ktransformers.util": {},
        "ktransformers.util.custom_gguf": {"GGUFLoader": object, "translate_name_to_gguf": lambda name: name},
        "ktransformers.util.custom_loader": {"GGUFLoader": object, "ModelLoaderFactory": object},
        "ktransformers.util.utils": {"set_module": _set_module, "load_weights": None},
    }
    modules = {name: types.ModuleType(name) for name in stand_ins}
    for name, values in stand_ins.items():
        vars(modules[name]).update(values)
    modules["ktransformers.util"].utils = modules["ktransformers.util.utils"]
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        spec = importlib.util.spec_from_file_location("legacy_rule_engine", root / ENGINE)
        engine = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(engine)
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    return LegacyEngine(engine.gen_optimize_config, engine.inject, root / ENGINE.parent / "optimize_rules")


def _set_module(parent: nn.Module, name: str, module: nn.Module) -> None:
    """The engine only ever names direct children."""
    setattr(parent, name, module)


def fetch() -> Path:
    """Build the release's pure-Python wheel into the cache and unpack it there."""
    with TemporaryDirectory() as folder:
        stand_ins = Path(folder)
        for name, text in BUILD_STAND_INS.items():
            (stand_ins / name).parent.mkdir(parents=True, exist_ok=True)
            (stand_ins / name).write_text(text)
        (stand_ins / "bin" / "nvcc").chmod(0o755)
        environment = {
            **os.environ,
            "CUDA_HOME": folder,
            "PYTHONPATH": folder,
            "PATH": f"{stand_ins / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        options = ("--no-deps", "--no-build-isolation", "--no-binary", "ktransformers", "--wheel-dir", folder)
        command = (sys.executable, "-m", "pip", "wheel", "--quiet", *options, f"ktransformers=={RELEASE}")
        subprocess.run(command, env=environment, check=True)
        with zipfile.ZipFile(next(stand_ins.glob("*.whl"))) as wheel:
            wheel.extractall(CACHE, [name for name in wheel.namelist() if name.startswith("ktransformers/optimize/")])
    return CACHE


if __name__ == "__main__":
    print(find() or fetch())
