"""The rules of the house as failing checks: which layer may import which, and who touches other people's internals."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybrimoe_kt"
FOLDERS = {"hybrimoe_kt": PACKAGE, "hybrimoe_kt.kernels": ROOT / "kernels"}

# layer -> what it may import of the package, besides config and errors
ALLOWED = {
    "core": {"core"},
    "device": {"device", "core"},
    "backends": {"backends", "device", "core", "kernels"},
    "runtime": {"runtime", "backends", "device", "core"},
    "operators": {"operators", "runtime", "backends", "device", "core"},
    "weights": {"weights", "backends", "device"},
    "host": {"host", "weights", "operators", "runtime", "backends", "device", "core"},
    "engine": {"engine", "host", "weights", "runtime", "device"},
    "sim": {"sim", "core"},
    "server": {"server", "engine", "host", "runtime"},
    "cli": {"cli", "server", "engine", "host", "weights", "runtime", "backends", "device", "core", "sim", "models"},
    "kernels": {"kernels"},
    "models": {"models"},
    "profiles": {"profiles", "core"},
}
EVERYBODYS = {"profiles"}
"""Data with the few lines that read it; not the core's."""
ROOT_FILES = {file.stem for file in PACKAGE.glob("*.py")}
# Imports that close a circle of files, and how the program can start nonetheless.
KNOWN_CIRCLES: dict[tuple[str, str], str] = {}
# What `core` must not import, as it touches neither clocks, threads nor files.
IMPURE = {"asyncio", "concurrent", "datetime", "importlib", "io", "multiprocessing", "os", "pathlib", "shutil"}
IMPURE |= {"signal", "socket", "subprocess", "tempfile", "threading", "time"}
READING = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
# core file -> what of these it uses
KNOWN_IMPURE: dict[str, set[str]] = {}
FASTAPI = ("app", "openai_routes", "responses_routes", "anthropic_routes", "ollama_routes")
# Foreign packages and the only files that may import them.
OWNED = {
    "kt_kernel": {"backends/kt_kernel_pool.py"},
    "ktransformers": {"host/kt/framework.py"},
    "cpuinfer_ext": {"backends/cpu_cpuinfer.py"},
    "triton": set(),
    "transformers.integrations": {"backends/dequantize.py"},
    "transformers.cli": set(),
    "fastapi": {f"server/{name}.py" for name in FASTAPI},
    "transformers.quantizers": {"host/hf/loading.py"},
}


def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name; the folder of kernels lies elsewhere."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            name = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()
FILES = {name: file for name, file in MODULES.items() if PACKAGE in file.parents}


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Every dotted name a module imports, wherever in it; relative ones made absolute, modules rather than packages."""
    file, found = MODULES[module], set()
    package = module.split(".")[: None if file.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, node.module or ""]).rstrip(".")
            names = [f"{origin}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else origin for name in names)
    return frozenset(found)


def layer_of(module: str) -> str:
    """The package below the root that a module lies in; "" for the root's own files, and for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "hybrimoe_kt" and len(parts) > 1 and parts[1] not in ROOT_FILES else ""


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_run_one_way(layer: str) -> None:
    allowed = ALLOWED[layer] | {""} | (EVERYBODYS if layer != "core" else set())
    for module in [module for module in MODULES if layer_of(module) == layer]:
        beyond = {layer_of(name) for name in imports(module)} - allowed
        assert not beyond, f"{module} imports of {beyond}"


def circles(edges: Mapping[str, Collection[str]]) -> list[set[str]]:
    """The sets of modules of which each imports, over others, every other."""
    reached: dict[str, set[str]] = {}
    for module in edges:
        seen, waiting = set(), list(edges[module])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges[name]
        reached[module] = seen
    found = {frozenset(name for name in seen if module in reached[name]) for module, seen in reached.items()}
    return [set(circle) for circle in sorted(found, key=sorted) if circle]


def test_no_file_imports_itself_over_others() -> None:
    """An import for types only, or within a function, hides a circle from Python and from nobody else."""
    edges = {module: imports(module) & MODULES.keys() - {module} for module in MODULES}
    known = {(f"hybrimoe_kt.{a}", f"hybrimoe_kt.{b}") for a, b in KNOWN_CIRCLES}
    assert circles({a: {b for b in to if (a, b) not in known} for a, to in edges.items()}) == []
    closed = circles(edges)
    for a, b in known:
        assert any({a, b} <= circle for circle in closed), f"{a} -> {b} closes no circle any more: take it off the list"


@pytest.mark.parametrize("foreign", OWNED)
def test_foreign_internals_have_one_owner(foreign: str) -> None:
    for module, file in FILES.items():
        if any(name == foreign or name.startswith(foreign + ".") for name in imports(module)):
            assert str(file.relative_to(PACKAGE)) in OWNED[foreign], f"{file.relative_to(ROOT)} imports {foreign}"


def test_the_core_is_pure() -> None:
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (PACKAGE / "core").rglob("*.py")]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'numpy', 'transformers', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_core_knows_no_clock_thread_or_file() -> None:
    found: dict[str, set[str]] = {}
    for module in [module for module in MODULES if layer_of(module) == "core"]:
        used = {name.split(".")[0] for name in imports(module)} & IMPURE
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                used |= {getattr(node.func, "id", getattr(node.func, "attr", ""))} & READING
        if used:
            found[str(MODULES[module].relative_to(PACKAGE / "core"))] = used
    assert found == KNOWN_IMPURE


def test_the_folder_named_kernels_does_not_disturb_transformers() -> None:
    """From the repository's root, Python finds our `kernels/` under a name that Transformers probes for."""
    code = "import transformers.utils.import_utils as probe; print(probe.is_kernels_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("True", "False")
