"""How long `plan_step` takes on an A6000, computed: `python -m tools.kernel_lab.plan_time`. No GPU; not a measurement.

Its machine code is walked instruction by instruction as the one program executes it, in order: an instruction starts
when its operands are there, two clocks after the one before. Latencies are taken on the high side of what is published
of sm_86: every load goes to DRAM, also those that find in a cache what an earlier one brought. As much as can be is
done: the search for the cut goes through every bit, and all but one of the experts are missing and brought, the last is
the CPU's. The fence before the host is asked is told apart: nothing published says how long it takes, 1 us is assumed.
Not in it: launching, other warps on the same core, and fetching instructions, for which the clocks that are left of the
bound are given by 128 bytes of code.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from hybrimoe_kt.kernels.plan_configs import plan_config
from hybrimoe_kt.kernels.plan_tables import PlanForm, record_size
from hybrimoe_kt.kernels.targets import TARGETS

from .build import build
from .plan_cases import plan_step_case

__all__ = ["BOUND_S", "LATENCIES", "SHAPES", "Shape", "Step", "Walk", "bytes_moved", "parse", "walk"]

BOUND_S = 5e-6
"""What a step's plan may take for the first of `SHAPES`, the fence apart."""
ISSUE_CLOCKS = 2
"""From one instruction of a warp to its next: half a warp a clock where integers are worked on."""
LATENCIES: Mapping[str, int] = MappingProxyType(
    {
        r"LDG": 600,
        r"ATOM": 0,  # nobody waits for what was there
        r"MEMBAR\.\w+\.SYS": 1800,
        r"MEMBAR": 600,
        r"LDS|STS": 33,
        r"SHFL": 30,
        r"REDUX": 40,
        r"BAR": 40,
        r"(F2I|I2F|MUFU|S2R|S2UR|R2UR|POPC|FLO)": 24,
        r"": 6,
    }
)
"""Start of an opcode -> clocks until its result may be used; the first that fits. Published: 4 to 5 for arithmetic, 23
to 33 for what crosses lanes or goes to shared memory, 450 to 600 for DRAM."""


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction with the registers it reads and writes; `jump` is the place that a branch goes to."""

    opcode: str
    reads: frozenset[str]
    writes: frozenset[str]
    is_guarded: bool = False
    jump: int | None = None


@dataclass(slots=True)
class Walk:
    """What a program executed: instructions, clocks, and clocks it stood still by the opcode it waited for."""

    instructions: int = 0
    clocks: int = 0
    waits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer, and how many experts a step brings to it."""

    num_experts: int
    top_k: int
    num_slots: int
    kept: int
    brought: int
    hidden_bytes: int


SHAPES = (
    Shape(128, 8, 64, 16, 7, 4096),
    Shape(256, 10, 128, 20, 9, 8192),
    Shape(256, 10, 256, 20, 9, 8192),
    Shape(128, 8, 32, 16, 2, 4096),
    Shape(256, 10, 64, 20, 2, 8192),
)
"""Qwen3-30B-A3B's with half in slots, which is held to BOUND_S; of 256 experts with half and with all in slots; and
both with a quarter in slots and two brought, twice what recorded traces miss there."""


def walk(code: Sequence[Step], trips: Sequence[int], latencies: Mapping[str, int] = LATENCIES) -> Walk:
    """Execute `code` once; `trips[i]` is how often the i-th loop runs, by where loops end. Other jumps forward that are
    guarded are not taken, so that what they would leave out is executed as well.
    """
    ends = _loop_ends(code)
    if len(ends) != len(trips):
        raise ValueError(f"the code has {len(ends)} loops, {len(trips)} numbers of trips are given")
    left = dict(zip(ends, trips, strict=True))
    found, ready, made_by, at = Walk(), dict[str, int](), dict[str, str](), 0
    while at < len(code):
        step = code[at]
        start, latest = found.clocks, max(step.reads | step.writes, key=lambda name: ready.get(name, 0), default="")
        if ready.get(latest, 0) > start:
            blamed = made_by[latest]
            found.waits[blamed] = found.waits.get(blamed, 0) + ready[latest] - start
            start = ready[latest]
        latency = next(clocks for opcode, clocks in latencies.items() if re.match(opcode, step.opcode))
        found.instructions += 1
        found.clocks = start + ISSUE_CLOCKS
        if step.opcode.startswith(("BAR", "MEMBAR")):
            found.clocks = start + latency
            found.waits[step.opcode] = found.waits.get(step.opcode, 0) + latency
        for name in step.writes:
            ready[name], made_by[name] = start + latency, step.opcode
        if step.opcode == "EXIT" and not step.is_guarded:
            break
        at = _next(code, at, left)
    return found


def _loop_ends(code: Sequence[Step]) -> list[int]:
    """Guarded jumps back; those that are not lead back from what only a warp executes whose threads are apart."""
    return [at for at, step in enumerate(code) if step.is_guarded and step.jump is not None and step.jump < at]


def _next(code: Sequence[Step], at: int, left: dict[int, int]) -> int:
    step = code[at]
    if step.jump is None:
        return at + 1
    if at in left:
        left[at] -= 1
        return step.jump if left[at] > 0 else at + 1
    is_taken = step.opcode == "BRA.CONV" or (step.opcode == "BRA" and not step.is_guarded)
    return step.jump if is_taken else at + 1


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_NO_RESULT = ("ST", "BAR", "MEMBAR", "BRA", "EXIT", "RED.", "ERRBAR", "WARPSYNC", "NOP", "CALL", "RET", "CCTL", "BSSY")


def parse(sass: str) -> list[Step]:
    """Read cuobjdump's listing of one kernel."""
    lines = _LINE.findall(sass)
    place = {int(address, 16): number for number, (address, *_) in enumerate(lines)}
    code = []
    for number, (_, guard, opcode, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
        jump = place.get(int(target[1], 16)) if target else None
        code.append(_step(opcode, guard, rest, jump if jump != number else None))
    return code


def _step(opcode: str, guard: str, rest: str, jump: int | None) -> Step:
    operands = [operand.strip() for operand in rest.split(",")]
    num_results = 0 if opcode.startswith(_NO_RESULT) else 1 + (re.fullmatch(r"U?P\w+", operands[0]) is not None)
    width = 4 if ".128" in opcode else 2 if ".WIDE" in opcode or ".64" in opcode else 1
    results, others, last = (
        operands[:num_results],
        operands[num_results:-1],
        operands[-1:] if num_results < len(operands) else [],
    )
    writes = {name for operand in results for name in _registers(operand, width)}
    # of what is read, the last is as wide: what is stored, or what a product is added to
    reads = {name for operand in others for name in _registers(operand, 1)}
    reads |= {name for operand in last for name in _registers(operand, width)}
    return Step(opcode, frozenset(reads | set(_registers(guard, 1))), frozenset(writes), bool(guard), jump)


def _registers(operand: str, width: int) -> list[str]:
    """Of a result or an argument; predicates are one, registers as many as are meant."""
    names = []
    for kind, number, pair in re.findall(r"\b(UP|UR|P|R)(\d+)(\.64)?", operand):
        count = 1 if "P" in kind else max(width, 2 if pair else 1)
        names += [f"{kind}{int(number) + part}" for part in range(count)]
    return names


def bytes_moved(shape: Shape) -> tuple[int, int]:
    """Bytes read and written on the device, and written to the host, if each value is moved once."""
    form = PlanForm(shape.num_experts, shape.top_k, prefetch_size=0)
    experts, slots, k, word = 4 * shape.num_experts, 4 * shape.num_slots, 4 * shape.top_k, 4
    # shares, scores, slots; experts, issued, landed; ids, weights, hits, misses; counts, totals, entry, visits
    read = 3 * experts + 3 * slots + 2 * k + 3 * k + 6 * word + shape.hidden_bytes
    # scores, two tables; copies, hits or misses; who came and who went; record; counts, totals, visits, on_cpu
    written = 3 * experts + 4 * k + 4 * word * shape.brought + 4 * record_size(form) + 6 * word
    return read + written, shape.hidden_bytes + 3 * k + 2 * word


def _sass(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True).stdout


def computed(shape: Shape, num_warps: int) -> tuple[Walk, int]:
    """What the program for a shape executes, and how many instructions it has."""
    case = plan_step_case(shape.num_experts, shape.top_k, shape.num_slots, shape.kept, shape.hidden_bytes, num_warps)
    code = parse(_sass(build(case, "sm_86").asm["cubin"]))
    chunks = -(-shape.hidden_bytes // (4 * plan_config(TARGETS["sm_86"], shape.num_experts).words))
    return walk(code, [25, shape.brought, chunks][: len(_loop_ends(code))]), len(code)


def main() -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    clock_hz = TARGETS["sm_86"].clock_hz
    times_s = []
    for shape in SHAPES:
        print(f"{shape}: {bytes_moved(shape)[0]} bytes on the device, {bytes_moved(shape)[1]} to the host")
        for num_warps in (1, 2, 4):
            found, size = computed(shape, num_warps)
            fence = sum(clocks for opcode, clocks in found.waits.items() if opcode.startswith("MEMBAR"))
            planned = found.clocks - fence
            waits = sorted(found.waits.items(), key=lambda wait: -wait[1])[:5]
            print(
                f"  {num_warps} warps: {found.instructions} executed of {size} instructions, {planned} clocks, "
                f"{planned / clock_hz * 1e6:.2f} us, {found.clocks / clock_hz * 1e6:.2f} with the fence; "
                f"{(BOUND_S * clock_hz - planned) / (size / 8):.0f} clocks left by 128 bytes of code; "
                f"waits {', '.join(f'{opcode} {clocks}' for opcode, clocks in waits)}"
            )
            if num_warps == plan_config(TARGETS["sm_86"], shape.num_experts).num_warps:
                times_s.append(planned / clock_hz)
    print(f"{times_s[0] * 1e6:.2f} us, at most {BOUND_S * 1e6:.0f}")
    return int(times_s[0] > BOUND_S)


if __name__ == "__main__":
    sys.exit(main())
