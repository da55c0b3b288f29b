"""Compiles one case for one target and measures its code; measurements are cached by everything they depend on."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrimoe_kt.kernels.targets import TARGETS

from . import machine_code
from .cases import Case
from .machine_code import Counts, Resources

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was read of one compiled case."""

    target: str
    case: str
    shared_bytes: int
    resources: Resources
    loop: Counts


def measure(case: Case, target_name: str, cache: Path | None = None) -> Measurement:
    """Compile `case` for a target and read its machine code, or take both from the folder `cache`."""
    kernel = _kernel(case.op)
    key = _key(kernel, case, target_name)
    file = cache / f"{key}.json" if cache else None
    if file and file.is_file():
        return _from_json(file.read_text(encoding="utf-8"))
    result = _compile(kernel, case, target_name)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
        partial.replace(file)
    return result


def _kernel(op: str) -> Any:
    module = importlib.import_module(f"hybrimoe_kt.kernels.{op}.kernel")
    return getattr(module, f"{op}_kernel")


def _key(kernel: Any, case: Case, target_name: str) -> str:
    import triton

    reader = Path(machine_code.__file__).read_bytes()
    # Claims and work are judged afresh each time: only what decides the machine code belongs into the key.
    parts = (triton.__version__, kernel.cache_key, case.constants, case.pointers, case.num_warps, case.num_stages)
    return hashlib.sha256(repr((*parts, target_name, case.name)).encode() + reader).hexdigest()[:32]


def _compile(kernel: Any, case: Case, target_name: str) -> Measurement:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[target_name]
    constants = dict(case.constants)
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else case.type_of(name) for name in names}
    # torch allocates on 512 bytes and more, so every pointer is a multiple of 16, as the launcher would see.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    with tempfile.TemporaryDirectory() as scratch:  # Triton's own cache would keep several megabytes a case
        os.environ["TRITON_CACHE_DIR"] = scratch
        built = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
        read = machine_code.read_cubin if target.backend == "cuda" else machine_code.read_amdgcn
        resources, loop = read(built.asm["cubin" if target.backend == "cuda" else "amdgcn"])
    return Measurement(target_name, case.name, built.metadata.shared, resources, loop)


def _from_json(text: str) -> Measurement:
    fields = json.loads(text)
    return Measurement(
        fields["target"],
        fields["case"],
        fields["shared_bytes"],
        Resources(**fields["resources"]),
        Counts(**fields["loop"]),
    )
