"""Builds the legacy framework with its C++ experts in a virtual environment of its own, once, under `.cache/legacy`.

`python -m tests.kt.environment` does it: about five minutes, most of them downloading PyTorch and compiling. Nothing of
the framework is changed. Its build asks for a CUDA toolkit (the headers are enough, no GPU), CMake and Ninja.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conformance.legacy_ktransformers import BUILD_STAND_INS, RELEASE

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "legacy"
PYTHON = CACHE / "venv" / "bin" / "python"
STAND_INS = Path(__file__).with_name("stand_ins")
# What the framework needs of its dependencies to load a model, chat and serve, in versions that it runs with.
PACKAGES = (
    "transformers==4.43.2",
    "numpy<2",
    "accelerate",
    "sentencepiece",
    "protobuf",
    "fire",
    "fastapi",
    "uvicorn",
    "pyyaml",
    "colorlog",
    "blessed",
    "sqlalchemy",
    "python-multipart",
    "httpx",
    "gguf==0.19.0",
)
READY = CACHE / f"ready-{RELEASE}-{zlib.crc32(' '.join(PACKAGES).encode()):08x}"
MISSING = "no legacy environment: run python -m tests.kt.environment"


def variables(home: Path) -> dict[str, str]:
    """The environment of a process that runs the framework without a GPU; `home` receives its settings file."""
    return {**os.environ, "HOME": str(home), "PYTHONPATH": str(STAND_INS), "TOKENIZERS_PARALLELISM": "false"}


def prepare() -> Path:
    """Return the environment's Python, building what is missing."""
    if not READY.is_file():
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        for needed in (toolkit / "include" / "cuda_runtime.h", shutil.which("cmake"), shutil.which("ninja")):
            if needed is None or not Path(needed).exists():
                sys.exit(f"the framework's C++ part needs CMake, Ninja and the CUDA toolkit's headers in {toolkit}")
        CACHE.mkdir(parents=True, exist_ok=True)
        _packages()
        if not any(CACHE.glob("venv/lib/python*/site-packages/cpuinfer_ext*.so")):
            with TemporaryDirectory() as folder:
                _framework(Path(folder), toolkit)
        READY.touch()
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    return PYTHON


def pip(*arguments: str, env: Mapping[str, str] | None = None) -> None:
    subprocess.run([str(PYTHON), "-m", "pip", "--quiet", *arguments], check=True, env=env)


def _packages() -> None:
    if not PYTHON.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(CACHE / "venv")], check=True)
    import torch

    pip("install", "--upgrade", "pip", "setuptools>=77,<80", "wheel", "packaging")
    pip("install", f"torch=={torch.__version__.partition('+')[0]}")
    pip("install", *PACKAGES)


def _framework(folder: Path, toolkit: Path) -> None:
    """Its Python part as a wheel, its C++ part with CMake, both out of one source distribution."""
    for name, text in BUILD_STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin" / "nvcc").chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "CUDA_HOME": str(folder), "PYTHONPATH": str(folder), "PATH": path}
    source = ("--no-deps", "--no-build-isolation", "--no-binary", "ktransformers", f"ktransformers=={RELEASE}")
    pip("download", *source, "--dest", str(folder), env=env)
    archive = next(folder.glob("*.tar.gz"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(archive), env=env)
    pip("install", "--no-deps", str(next(folder.glob("*.whl"))))
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "source", filter="data")
    _experts(next((folder / "source").iterdir()) / "ktransformers" / "ktransformers_ext", folder / "build", toolkit)


def _experts(source: Path, build: Path, toolkit: Path) -> None:
    out = build / "out"
    options = ("-DLLAMA_NATIVE=ON", f"-DPYTHON_EXECUTABLE={PYTHON}", "-DCMAKE_POLICY_VERSION_MINIMUM=3.5")
    env = {**os.environ, "CUDA_HOME": str(toolkit)}
    configure = ["cmake", "-G", "Ninja", *options, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}", "-S", source, "-B", build]
    subprocess.run([str(part) for part in configure], check=True, env=env)
    subprocess.run(["cmake", "--build", str(build), "--target", "cpuinfer_ext", "--parallel", "2"], check=True, env=env)
    where = [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]
    libraries = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    shutil.copy(next(out.glob("cpuinfer_ext*.so")), libraries)


if __name__ == "__main__":
    print(prepare())
