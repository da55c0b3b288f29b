"""Machine code as a list of instructions, and what is counted in its main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Counts", "Instruction", "Resources", "read_amdgcn", "read_cubin"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """`jump` is the place of the instruction a branch goes to, if it is one."""

    opcode: str
    jump: int | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions of the main loop, the innermost one with most work in it, or of all if there is no loop."""

    all: int
    integer: int
    wide_loads: int
    narrow_loads: int
    conversions: int
    tensor: int
    dot: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Resources:
    registers: int
    spilled_bytes: int


Matcher = Callable[[str], bool]


def _matcher(pattern: str) -> Matcher:
    compiled = re.compile(pattern)
    return lambda opcode: compiled.match(opcode) is not None


_SASS = {
    "integer": _matcher(r"(LOP3|SHF|IADD|IDP|PRMT|LEA|ISETP|SGXT|IMNMX|VIMNMX|VIADD|BMSK|SEL)"),
    "wide_loads": _matcher(r"(LDG|LDGSTS)\S*\.128"),
    "narrow_loads": _matcher(r"(LDG|LDGSTS)(?!\S*\.128)"),
    "conversions": _matcher(r"(I2F|F2I)"),
    "tensor": _matcher(r"(HMMA|HGMMA|IMMA|UTCHMMA|UTCQMMA)"),
    "dot": _matcher(r"IDP"),
}
_AMD = {
    "integer": _matcher(r"v_(?!mfma|wmma)"),
    "wide_loads": _matcher(r"(global|buffer)_load_(dwordx4|b128)"),
    "narrow_loads": _matcher(r"(global|buffer)_load_(?!dwordx4|b128)"),
    "conversions": _matcher(r"v_cvt_(f32_[iu]32|f32_ubyte|[iu]32_f32)"),
    "tensor": _matcher(r"v_(mfma|wmma)"),
    "dot": _matcher(r"v_dot4"),
}


def _count(code: Sequence[Instruction], kinds: dict[str, Matcher]) -> Counts:
    numbers = {name: sum(match(step.opcode) for step in code) for name, match in kinds.items()}
    return Counts(all=len(code), **numbers)


def _loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Bodies (first, last) of innermost loops: from where backward jumps lead to the last of them, holding no other."""
    spans: dict[int, int] = {}
    for at, step in enumerate(code):
        if step.jump is not None and step.jump < at:
            spans[step.jump] = at
    return [(a, b) for a, b in spans.items() if not any(a < first and last <= b for first, last in spans.items())]


def main_loop(code: Sequence[Instruction], kinds: dict[str, Matcher]) -> Counts:
    bodies = [_count(code[first : last + 1], kinds) for first, last in _loops(code)]
    whole = _count(code, kinds)
    return max(bodies, key=lambda body: (body.tensor, body.dot, body.wide_loads, body.all), default=whole)


def read_cubin(cubin: bytes) -> tuple[Resources, Counts]:
    """Disassemble an NVIDIA binary with the tools inside Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    resources = Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"])
    return resources, main_loop(_parse_sass(text), _SASS)


def _parse_sass(text: str) -> list[Instruction]:
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    place = {int(address, 16): number for number, (address, _, _) in enumerate(lines)}
    code = []
    for number, (_, opcode, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
        jump = place.get(int(target[1], 16)) if target else None
        code.append(Instruction(opcode, jump if jump != number else None))  # the last one spins on itself: padding
    return code


def read_amdgcn(text: str) -> tuple[Resources, Counts]:
    """Read AMD's assembly text and the metadata at its end."""
    numbers = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    spilled = numbers["private_segment_fixed_size"] + 4 * numbers["vgpr_spill_count"]
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        step = re.match(r"\t([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|scratch_\w+|flat_\w+)(?:\s+(\.LBB\w+))?", line)
        if label:
            labels[label[1]] = len(code)
        elif step:
            if step[2]:
                jumps.append((len(code), step[2]))
            code.append(Instruction(step[1]))
    for at, name in jumps:
        code[at] = Instruction(code[at].opcode, labels.get(name))
    return Resources(numbers["vgpr_count"], spilled), main_loop(code, _AMD)
