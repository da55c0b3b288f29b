"""`hybrimoe doctor`: what the last run on an accelerator came to."""

from __future__ import annotations

from typing import Any

import pytest

from hybrimoe_kt.cli import doctor
from hybrimoe_kt.host import last_runs
from hybrimoe_kt.runtime.health import AcceleratorHealth, Health
from tests.cli.doctor_machine import no_profile_no_gpu, report, with_gpu

__all__ = ["no_profile_no_gpu", "with_gpu"]  # fixtures


def note(**counts: Any) -> None:
    last_runs.RunNote("a model").at_end(Health({"cuda": AcceleratorHealth(**counts)}))


@pytest.mark.usefixtures("with_gpu")
def test_what_the_last_run_came_to(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kt_kernel")
    note(failed_steps=3, shrunk=1, given_up=True, last_failure="CUDA error: an illegal memory access")
    found = report(capsys)
    run = found["last_runs"]["cuda"]
    assert run.pop("date").startswith("20")
    assert run == {
        "model": "a model", "failed_steps": 3, "shrunk": 1, "given_up": True,
        "last_failure": "CUDA error: an illegal memory access",
    }  # fmt: skip
    verdict = found["verdict"]
    assert verdict["ready"] and verdict["text"] == (
        "ready, but cuda was given up after 3 layer steps in its last run, and the CPU answered: "
        "CUDA error: an illegal memory access"
    )
    assert verdict["next"] == "ktransformers --accelerator cuda --gpu_backend torch --verbose"
    note()  # a clean run
    assert report(capsys)["last_runs"] == {}


@pytest.mark.usefixtures("with_gpu")
def test_a_last_run_short_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kt_kernel")
    note(shrunk=2, last_failure="CUDA out of memory. Tried to allocate 2.00 GiB")
    verdict = report(capsys)["verdict"]
    assert "cuda ran out of memory in its last run; give a smaller --cache_size" in verdict["text"]


def test_the_last_run_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    note(failed_steps=1, given_up=True, last_failure="CUDA error: an illegal memory access \x1b[2J was encountered")
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith("next: "))
    table = " ".join(shown.replace("│", " ").split())
    assert "last run on cuda 1 failed step (CUDA error: an illegal memory access [2J was encountered), given" in table
    assert "up; a model, 20" in table


@pytest.mark.parametrize("content", ["", "{", "[]", '{"accelerators": 3}', '{"accelerators": {"cuda": {"model": 1}}}'])
def test_a_damaged_note_is_no_error(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    last_runs.state_path().write_text(content)
    assert report(capsys)["last_runs"] == {}
    note(failed_steps=1)
    assert report(capsys)["last_runs"]["cuda"]["failed_steps"] == 1
