"""The arithmetic of a step's computed time, on listings made by hand; and what it says of the kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tools.kernel_lab.plan_time import SHAPES, Shape, bytes_moved, parse, walk

CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IMAD.WIDE R2, R0, R9, c[0x0][0x160] ;
        /*0020*/                   LDG.E.64 R4, [R2.64] ;
        /*0030*/                   IADD3 R6, R5, 0x1, RZ ;
        /*0040*/                   ISETP.GE.AND P0, PT, R6, 0x4, PT ;
        /*0050*/              @!P0 BRA 0x30 ;
        /*0060*/               @P0 BRA 0x80 ;
        /*0070*/                   STG.E [R2.64], R6 ;
        /*0080*/                   MEMBAR.ALL.SYS ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""
CLOCKS = {"LDG": 100, "S2R": 20, "MEMBAR": 50, "": 6}


def test_registers_of_every_width_are_read_and_written() -> None:
    steps = parse(CODE)
    assert steps[1].reads == {"R0", "R9"} and steps[1].writes == {"R2", "R3"}
    assert steps[2].reads == {"R2", "R3"} and steps[2].writes == {"R4", "R5"}
    assert steps[4].reads == {"R6"} and steps[4].writes == {"P0"}
    assert [(step.jump, step.is_guarded) for step in steps[5:7]] == [(3, True), (8, True)]
    assert steps[7].reads == {"R2", "R3", "R6"} and steps[7].writes == frozenset()
    assert steps[10].jump is None  # padding


def test_clocks_are_issue_and_what_is_waited_for() -> None:
    """S2R at 0, its product at 20, the load at 26, its use at 126; three trips of 6 + 6 + 2; 50 for the fence."""
    found = walk(parse(CODE), [3], CLOCKS)
    assert found.instructions == 3 + 3 * 3 + 4
    # trips: 126, 132, 138 | 140, 146, 152 | 154, 160, 166; then 168 BRA, 170 STG, 172 MEMBAR to 222, EXIT to 224
    assert found.clocks == 224
    assert found.waits["LDG.E.64"] == 98 and found.waits["S2R"] == 18 and found.waits["MEMBAR.ALL.SYS"] == 50


def test_trips_must_be_said_of_every_loop() -> None:
    with pytest.raises(ValueError, match="1 loops, 0 numbers"):
        walk(parse(CODE), [])


def test_bytes_are_those_of_the_tables() -> None:
    read = 3 * 4 * 8 + 3 * 4 * 2 + 5 * 4 + 24 + 64
    written = 3 * 4 * 8 + 4 * 4 + 16 + 4 * 6 + 24
    assert bytes_moved(Shape(8, 1, 2, 2, 1, 64)) == (read + written, 64 + 12 + 8)
    assert all(bytes_moved(shape)[0] < 32 << 10 for shape in SHAPES)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers run on Linux")
def test_a_plan_is_computed_to_take_at_most_five_microseconds() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernel_lab.plan_time"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"^[1-4]\.\d\d us, at most 5$", done.stdout, re.MULTILINE)
