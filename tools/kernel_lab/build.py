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

__all__ = ["Measurement", "build", "measure"]


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
    source = _source(case)
    key = _key(source, case, target_name)
    file = cache / f"{key}.json" if cache else None
    if file and file.is_file():
        return _from_json(file.read_text(encoding="utf-8"))
    result = _compile(source, case, target_name)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
        partial.replace(file)
    return result


def _kernel(op: str) -> Any:
    module = importlib.import_module(f"hybrimoe_kt.kernels.{op}.kernel")
    return getattr(module, f"{op}_kernel")


def _source(case: Case) -> Any:
    """The kernel with its constants, as Triton compiles it."""
    from triton.compiler import ASTSource

    kernel, constants = _kernel(case.op), dict(case.constants)
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else case.type_of(name) for name in names}
    # torch allocates on 512 bytes and more, so every pointer is a multiple of 16, as the launcher would see.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)


def _key(source: Any, case: Case, target_name: str) -> str:
    """What decides the machine code: Triton's first form of the kernel, which is a tenth of the work of compiling it.

    Where a type is read, only what is called for that type is in it. Claims and work are judged afresh each time.
    """
    import triton

    reader = Path(machine_code.__file__).read_bytes()
    parts = (triton.__version__, _first_form(source, case, target_name), case.num_warps, case.num_stages)
    return hashlib.sha256(repr((*parts, target_name, case.name)).encode() + reader).hexdigest()[:32]


def _first_form(source: Any, case: Case, target_name: str) -> str:
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target = _gpu_target(target_name)
    backend = make_backend(target)
    options = backend.parse_options(_options(case))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target, options, *made, context))


def _options(case: Case) -> dict[str, int]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages}


def _gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    target = TARGETS[name]
    return GPUTarget(target.backend, target.arch, target.warp_size)


def build(case: Case, target_name: str) -> Any:
    """Compile `case` for a target: what Triton returns."""
    return _built(_source(case), case, target_name)


def _built(source: Any, case: Case, target_name: str) -> Any:
    import triton

    with tempfile.TemporaryDirectory() as scratch:  # Triton's own cache would keep several megabytes a case
        os.environ["TRITON_CACHE_DIR"] = scratch
        return triton.compile(source, target=_gpu_target(target_name), options=_options(case))


def _compile(source: Any, case: Case, target_name: str) -> Measurement:
    built = _built(source, case, target_name)
    is_cuda = TARGETS[target_name].backend == "cuda"
    read = machine_code.read_cubin if is_cuda else machine_code.read_amdgcn
    resources, loop = read(built.asm["cubin" if is_cuda else "amdgcn"])
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
