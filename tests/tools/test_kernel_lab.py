"""The offline gate: green on what is committed, in its reduced form; red on what would run badly, each reason once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hybrimoe_kt.kernels.targets import TARGETS
from hybrimoe_kt.quants import kernel_types
from tools.kernel_lab.build import Measurement
from tools.kernel_lab.cases import Case, cases_for
from tools.kernel_lab.checks import rejections
from tools.kernel_lab.headroom import headroom, tensor_share
from tools.kernel_lab.machine_code import _SASS, Counts, Resources, _parse_sass, main_loop, read_amdgcn

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernels-table.md"
# kernels are compiled in processes of their own: here the interpreter is on
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
compiles = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers run on Linux")


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.kernel_lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=COMPILING)


KNOWN = {
    "3.6": [
        f"gfx1100 {op}[Q6_K bf16 x16]: has 0 16-byte loads in its main loop, 1 are claimed"
        for op in ("prefill_down", "linear_many")
    ],
}
"""Triton version -> what the gate, whose demands were read from 3.7.1's code, rejects of its code, rightly."""


@compiles
def test_the_reduced_gate_is_green() -> None:
    done, known = gate("--reduced"), KNOWN.get(version("triton")[:3], [])
    assert done.stderr.splitlines() == known
    assert done.returncode == bool(known)
    assert re.search(rf"^20 kernels, {len(known)} rejections", done.stdout)


def test_half_a_table_is_never_written() -> None:
    done = gate("--reduced", "--write", "table.md")
    assert done.returncode == 2
    assert "leave out --reduced, --target and --mixtures" in done.stderr


@compiles
@pytest.mark.slow
def test_the_committed_table_is_what_the_kernels_compile_to(tmp_path: Path) -> None:
    if f"Triton {version('triton')}," not in TABLE.read_text(encoding="utf-8"):
        pytest.skip(f"the table was written with another Triton than {version('triton')}")
    done = gate("--write", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == TABLE.read_text(encoding="utf-8")


def test_the_committed_table_has_every_case_of_every_target() -> None:
    parts = re.split(r"^## (\w+):.*$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(tables) == list(TARGETS)
    for name, text in tables.items():
        rows = re.findall(r"^\| (\w+ [^|]+?) \|", text, flags=re.MULTILINE)
        assert [f"{case.op} {case.variant}" for case in cases_for(TARGETS[name])] == rows


BAD = """
import sys
from hybrimoe_kt.quants import TYPES
from tools.kernel_lab import cases
from tools.kernel_lab.build import measure
from tools.kernel_lab.checks import rejections
from hybrimoe_kt.kernels.configs import PrefillConfig
from hybrimoe_kt.kernels.targets import TARGETS
config = PrefillConfig(rows=128, pairs=128, num_warps=4, num_stages=2)
for target in sys.argv[1:]:
    case = cases._grouped(TARGETS[target], config, TYPES[12], TYPES[12], "fp16")
    print(target, *rejections(case, measure(case, target)))
"""


@compiles
def test_a_bad_configuration_is_rejected() -> None:
    """128 x 128 sums for gate and up in four warps: 256 registers a thread before anything else."""
    targets = ["sm_86", "gfx1100"]
    command = [sys.executable, "-c", BAD, *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=COMPILING)
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == targets
    for line in said:
        assert re.search(r"spills \d+ bytes of registers; use fewer rows, pairs or stages", line)


def case_of(op: str, variant: str) -> Case:
    return next(case for case in cases_for(TARGETS["sm_86"]) if (case.op, case.variant) == (op, variant))


def fine(case: Case) -> Measurement:
    """A measurement that `case` passes with."""
    loop = Counts(200, 100, case.claims.wide_loads, 4, case.claims.max_conversions, 16, 16)
    return Measurement("sm_86", case.name, 1024, Resources(64, 0), loop)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (("decode_down", "Q4_K"), {"resources": Resources(64, 8)}, "spills 8 bytes"),
        (("decode_down", "Q4_K"), {"shared_bytes": 100 << 10}, "needs 102400 bytes of shared memory, 101376 are there"),
        (("decode_down", "Q4_K"), {"wide_loads": 3}, "has 3 16-byte loads in its main loop, 4 are claimed"),
        (
            ("decode_down", "IQ3_XXS"),
            {"narrow_loads": 13},
            "has 13 loads under 16 bytes in its main loop, 12 are allowed",
        ),
        (("decode_down", "Q4_K"), {"dot": 0}, "has no dot-product instruction"),
        (("decode_down", "Q4_K"), {"conversions": 3}, "converts between int and float 3 times in its main loop, 2 are"),
        (("prefill_down", "Q4_K fp16 x32"), {"tensor": 0}, "has no tensor-core instruction"),
        (("prefill_down", "Q4_K fp16 x32"), {"conversions": 1}, "1 times in its main loop, 0 are allowed"),
        (("combine_pairs", "fp32"), {"wide_loads": 0}, "has 0 16-byte loads"),
    ],
)
def test_each_reason(case: tuple[str, str], change: dict[str, object], message: str) -> None:
    judged = case_of(*case)
    good = fine(judged)
    assert rejections(judged, good) == []
    if set(change) <= {"resources", "shared_bytes"}:
        bad = replace(good, **change)  # type: ignore[arg-type]
    else:
        bad = replace(good, loop=replace(good.loop, **change))  # type: ignore[arg-type]
    (reason,) = rejections(judged, bad)
    assert reason.startswith(f"sm_86 {judged.name}: ")
    assert message in reason


def test_an_unrolled_loop_may_convert_as_often_as_it_repeats() -> None:
    case = case_of("decode_down", "Q4_K")
    good = fine(case)
    twice = replace(good.loop, wide_loads=8, conversions=4)
    assert rejections(case, replace(good, loop=twice)) == []


def test_headroom_by_hand() -> None:
    """4 rows x 32 units x 32 values of 4.5 bits: 2304 bytes, of which an A6000 core gets 5.08 a clock: 453.6 clocks.
    Four warps issue 200 instructions each, four a clock, 100 of them integer, two a clock: 200 clocks."""
    case = case_of("decode_down", "Q4_K")
    assert headroom(case, fine(case)) == pytest.approx(453.6 / 200, rel=1e-3)
    assert tensor_share(case, fine(case)) is None


def test_headroom_of_look_ups_by_hand() -> None:
    """32 values of 2.0625 bits a thread: 1056 bytes, 207.9 clocks of an A6000 core's share of DRAM. Four warps whose L1
    cache delivers 2 x 4 clocks of activations, 4 loads, and four 8-byte look-ups in 6.2 clocks each instead of one."""
    case = case_of("decode_down", "IQ2_XXS")
    few = replace(fine(case), loop=replace(fine(case).loop, all=80, integer=40, narrow_loads=4 + 4))
    assert headroom(case, few) == pytest.approx(207.9 / (4 * (8 + 4 + 4 * 6.2)), rel=1e-3)
    assert headroom(case, replace(few, target="gfx1100")) == pytest.approx(
        1056 / 4 / (2 * 4 + 4 + 4 * 8) / TARGETS["gfx1100"].dram_bytes_per_core_clock, rel=1e-3
    )


def test_tensor_share_by_hand() -> None:
    """64 rows x 32 pairs x 64 columns: 131072 multiply-adds, 512 a clock: 256 clocks, more than the 200 of issuing."""
    case = case_of("prefill_down", "Q4_K fp16 x32")
    assert tensor_share(case, fine(case)) == 1.0
    slow = replace(fine(case), loop=replace(fine(case).loop, all=512))
    assert tensor_share(case, slow) == 0.5
    assert headroom(case, slow) is None


SASS = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/              @!P0 BRA 0x60 ;
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/                   IDP.4A.S8.S8 R0, R4, R8, R0 ;
        /*0040*/                   I2FP.F32.S32 R0, R0 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_only_the_loop_is_counted() -> None:
    code = _parse_sass(SASS)
    assert [step.opcode for step in code][:2] == ["LDG.E.128", "BRA"]
    assert main_loop(code, _SASS) == Counts(4, 1, 1, 0, 1, 0, 1)


AMD = """kernel:
\tv_mov_b32_e32 v0, 0
.LBB0_1:
\tglobal_load_b128 v[0:3], v[8:9], off
\ts_cbranch_execz .LBB0_1
\tv_dot4_i32_iu8 v0, v1, v2, v0 neg_lo:[1,1,0]
\ts_branch .LBB0_1
\ts_endpgm
    .private_segment_fixed_size: 16
    .vgpr_count:     48
    .vgpr_spill_count: 2
"""


def test_amd_assembly_is_read() -> None:
    """A loop with two ways back is one loop; scratch memory and spilled registers both count."""
    resources, loop = read_amdgcn(AMD)
    assert resources == Resources(48, 24)
    assert (loop.all, loop.wide_loads, loop.dot) == (4, 1, 1)


def test_the_document_quotes_the_table() -> None:
    """docs/kernels.md shows four rows of it, and those of code words; here they are looked up again."""
    parts = re.split(r"^## \w+: ([^,]+),.*$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    tables = dict(zip(parts[::2], parts[1::2], strict=True))

    def found(product: str, kernel: str, place: int) -> str:
        cells = re.findall(rf"^\| {kernel} \|.*\| ([^|]*) \|$", tables[product], flags=re.MULTILINE)
        return cells[place].strip() if place < len(cells) else ""

    lines = TABLE.with_name("kernels.md").read_text(encoding="utf-8").splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("| read from the table"))
    assert lines[at].strip("| ").split(" | ")[1:] == list(tables)
    for offset, kernel, place in (
        (2, "decode_gate_up Q4_K", 0),
        (3, "decode_down Q6_K", 0),
        (4, r"prefill_gate_up Q4_K fp16 x\d+", 0),
        (5, r"prefill_gate_up Q4_K fp16 x\d+", 1),
    ):
        quoted = [cell.strip() for cell in lines[at + offset].split("|")[2:-1]]
        assert quoted == [found(product, kernel, place) for product in tables], lines[at + offset]
    at = next(number for number, line in enumerate(lines) if line.startswith("| code words, read from the table"))
    assert lines[at].strip("| ").split(" | ")[1:] == list(tables)
    looked_up = [row.name for row in kernel_types() if row.unit and row.unit.look_ups]
    rows = [line.split("|") for line in lines[at + 2 : at + 2 + 2 * len(looked_up)]]
    kernels = {cells[1].strip().removesuffix(", headroom"): [cell.strip() for cell in cells[2:-1]] for cells in rows}
    assert set(kernels) == {f"{op} {name}" for op in ("decode_gate_up", "decode_down") for name in looked_up}
    for kernel, quoted in kernels.items():
        assert quoted == [found(product, kernel, 0) for product in tables], kernel
