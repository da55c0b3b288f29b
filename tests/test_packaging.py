"""What is in the tree is in the wheel: an unlisted package would vanish without a word."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Packages whose folder lies elsewhere, the mapping of pyproject.toml turned round.
MOVED = {folder: name for name, folder in SETUPTOOLS["package-dir"].items()}


def packages_in_tree() -> set[str]:
    """Return every folder with an __init__.py, under the name it is imported by."""
    found = set()
    for top, name in MOVED.items():
        for init in (ROOT / top).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *inner)))
    return found


def test_listed_packages_are_those_of_the_tree():
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_in_tree())


def test_every_folder_with_code_is_a_package():
    for top in MOVED:
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.relative_to(ROOT)} is in no package"


def test_version_and_console_scripts():
    package = importlib.import_module("hybrimoe_kt")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", package.__version__)
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_kernels_and_rules_are_importable_under_their_package_names():
    for name in MOVED.values():
        assert importlib.import_module(name).__name__ == name


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hybrimoe_kt; print(sorted({'torch', 'transformers', 'numpy', 'kt_kernel'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_a_bare_checkout_runs_without_being_installed():
    """Libraries from this environment, but none of its .pth files: an editable install is one."""
    code = """
import sys
sys.path[:0] = [sys.argv[1], *sys.argv[2:]]
import hybrimoe_kt, hybrimoe_kt.kernels.configs, importlib.resources
assert hybrimoe_kt.__file__.startswith(sys.argv[1]) and hybrimoe_kt.kernels.__file__.startswith(sys.argv[1])
print((importlib.resources.files("hybrimoe_kt.optimize_rules") / "qwen3moe.yaml").is_file())
"""
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    command = [sys.executable, "-S", "-c", code, str(ROOT), *libraries]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert shown.stdout.strip() == "True", shown.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Build from a copy of the tracked and new files, so that nothing is written into the tree."""
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools below 77 cannot build this project without isolation")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z", "--", *MOVED, "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, cwd=folder)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_contains_everything(wheel):
    names = set(wheel.namelist())
    for folder, package in MOVED.items():
        for file in (ROOT / folder).rglob("*"):
            inside = file.relative_to(ROOT / folder).as_posix()
            if (
                file.is_file()
                and file.suffix in (".py", ".yaml", ".gguf", ".json", ".html", ".js", ".css")
                and "__pycache__" not in inside
            ):
                assert f"{package.replace('.', '/')}/{inside}" in names
    assert "hybrimoe_kt/kernels/__init__.py" in names
    assert "hybrimoe_kt/py.typed" in names
    assert {"hybrimoe_kt/optimize_rules/qwen3moe.yaml", "hybrimoe_kt/optimize_rules/deepseek2.yaml"} <= names
    assert any(re.fullmatch(r"hybrimoe_kt/models/[^/]+\.gguf", name) for name in names)
    assert not any(name.startswith(("tests/", "kernels/", "optimize_rules/")) for name in names)


def test_wheel_carries_licence_and_scripts(wheel):
    names = wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    scripts = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "ktransformers = hybrimoe_kt.cli.main:main" in scripts
    assert "hybrimoe = hybrimoe_kt.cli.tools:main" in scripts


def test_embedded_model_ships_with_its_provenance(wheel):
    notes = [name for name in wheel.namelist() if name.startswith("hybrimoe_kt/models/") and name.endswith(".md")]
    assert notes, "the embedded model has no provenance and licence beside it"
