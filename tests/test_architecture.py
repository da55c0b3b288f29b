"""The rules of the house as failing checks: which layer may import which, and who touches other people's internals."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybrimoe_kt"

# layer -> what it may import of the package, besides config and errors
ALLOWED = {
    "core": {"core"},
    "device": {"device", "core"},
    "backends": {"backends", "device", "core"},
    "runtime": {"runtime", "backends", "device", "core"},
    "operators": {"operators", "runtime", "device", "core"},
    "weights": {"weights", "runtime", "backends", "device"},
    "host": {"host", "weights", "operators", "runtime", "backends", "device", "core"},
    "engine": {"engine", "host", "weights", "runtime", "device"},
    "sim": {"sim", "core"},
    "server": {"server", "engine", "host", "weights", "runtime", "device", "core"},
    "cli": {
        "cli",
        "server",
        "engine",
        "host",
        "weights",
        "operators",
        "runtime",
        "backends",
        "device",
        "core",
        "sim",
        "models",
    },
}
DATA = {"profiles", "models", "optimize_rules"}
"""Packages of data with the few lines that read it: everybody's but the core's."""
# Foreign packages and the only files that may import them.
OWNED = {
    "kt_kernel": {"backends/kt_kernel_pool.py"},
    "ktransformers": {"host/kt/framework.py"},
    "cpuinfer_ext": {"backends/cpu_cpuinfer.py"},
    "triton": set(),
    "transformers.integrations": {"backends/dequantize.py", "engine/tokenizer.py"},
    "transformers.cli": {"engine/response_format.py"},
    "fastapi": {"server/app.py", "server/openai_routes.py", "server/ollama_routes.py"},
    "transformers.quantizers": {"host/hf/loading.py"},
}


def imports(file: Path) -> Iterator[str]:
    """Every dotted name a file imports, relative ones made absolute."""
    package = ["hybrimoe_kt", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, node.module or ""]).rstrip(".")
            yield origin
            if origin.startswith("hybrimoe_kt"):  # `from hybrimoe_kt import cli` imports a layer, too
                yield from (f"{origin}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_run_one_way(layer: str) -> None:
    for file in (PACKAGE / layer).rglob("*.py"):
        for name in imports(file):
            parts = name.split(".")
            if (
                parts[0] == "hybrimoe_kt"
                and len(parts) > 1
                and (layer == "core" or parts[1] not in DATA)
                and (PACKAGE / parts[1]).is_dir()
            ):
                assert parts[1] in ALLOWED[layer], f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("layer", sorted(ALLOWED.keys() - {"device"}))
def test_files_of_a_layer_import_each_other_one_way(layer: str) -> None:
    """Imports inside functions and for type checkers count, too: they only hide a circle."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in (PACKAGE / layer).rglob("*.py")}
    TopologicalSorter({name: set(imports(file)) & names.keys() - {name} for name, file in names.items()}).prepare()


@pytest.mark.parametrize("foreign", OWNED)
def test_foreign_internals_have_one_owner(foreign: str) -> None:
    for file in FILES:
        if any(name == foreign or name.startswith(foreign + ".") for name in imports(file)):
            assert str(file.relative_to(PACKAGE)) in OWNED[foreign], f"{file.relative_to(ROOT)} imports {foreign}"


def test_the_core_is_pure() -> None:
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (PACKAGE / "core").rglob("*.py")]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'numpy', 'transformers', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_folder_named_kernels_does_not_disturb_transformers() -> None:
    """From the repository's root, Python finds our `kernels/` under a name that Transformers probes for."""
    code = "import transformers.utils.import_utils as probe; print(probe.is_kernels_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("True", "False")
