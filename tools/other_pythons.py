"""Run a part of the tests under the oldest and the newest other Python of this machine: `make test-pythons`.

What needs no PyTorch, which for other Pythons may only be had with gigabytes of CUDA: the core, simulations, types, and
ggml's library with products of every type. Each gets an environment of its own in .cache and loses it again. Where
there is no other Python, that is said and nothing fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = tuple(f"3.{minor}" for minor in range(10, 15))
"""Those that every dependency has wheels for."""
TESTS = (
    "tests/core", "tests/sim", "tests/test_quants.py", "tests/backends/test_ggml_products.py"
)  # fmt: skip
NEEDED = (
    "numpy", "pyyaml", "gguf", "rich", "matplotlib", "pytest", "hypothesis", "scipy",
    "libggml-python>=0.20.2,<0.21", "tqdm",
)  # fmt: skip


def candidates(version: str) -> Iterator[str]:
    """Where an interpreter of a version may be: on the PATH, or one of pyenv's."""
    if found := shutil.which(f"python{version}"):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for folder in sorted(pyenv.glob(f"versions/{version}.*"), reverse=True):
        yield str(folder / "bin" / "python")


def interpreter(version: str) -> str | None:
    """The first that runs, is of that version, and can make environments; pyenv's own stand-ins may not."""
    code = f"import ensurepip, venv, sys; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    for python in candidates(version):
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


def chosen() -> dict[str, str]:
    """Version -> interpreter of the oldest and the newest one but ours."""
    ours = "{}.{}".format(*sys.version_info)
    found = {version: python for version in VERSIONS if version != ours and (python := interpreter(version))}
    ends = list(found)[:1] + list(found)[1:][-1:]
    return {version: found[version] for version in ends}


def try_out(version: str, python: str, tests: list[str], *, keep: bool) -> int:
    """Install and run the tests; return pytest's exit code."""
    folder = ROOT / ".cache" / f"python-{version}"
    own = str(folder / "bin" / "python")
    pip = [own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    try:
        if not Path(own).exists():
            subprocess.run([python, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, "--upgrade", "pip>=23"], check=True)
        subprocess.run([*pip, *NEEDED], check=True)
        only = ["--noconftest", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]  # conftest.py wants PyTorch
        command = [own, "-m", "pytest", "-q", *only, *tests]
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Try each; 0 where all passed, or where there is none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--versions", nargs="*", default=None, metavar="3.N", help="these instead of the two ends")
    parser.add_argument("--keep", action="store_true", help="leave the environments, for another run")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    if options.versions is None:
        pythons = chosen()
    else:
        pythons = {version: python for version in options.versions if (python := interpreter(version))}
    if not pythons:
        print("no other Python here: only this one was tried")
    failed = []
    for version, python in pythons.items():
        print(f"Python {version}: {python}", flush=True)
        if try_out(version, python, options.tests, keep=options.keep):
            failed.append(version)
    if failed:
        print(f"failed under Python {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
