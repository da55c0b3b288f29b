"""No benchmark prints times of a run in which something failed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import hybrid, overhead, speed
from benchmarks.clean import refuse_unless_clean, what_happened
from hybrimoe_kt.runtime.health import AcceleratorHealth, Health
from hybrimoe_kt.runtime.runtime import Runtime

FAILED = Health({"cuda": AcceleratorHealth(failed_steps=1, last_failure="out of memory")})
FALLEN_BACK = Health({"cuda": AcceleratorHealth()}, fallback="cpu_only")


@pytest.mark.parametrize(
    ("health", "said"),
    [
        (Health(), ""),
        (Health({"cuda": AcceleratorHealth()}, fallback="hybrid"), ""),
        (FAILED, "failed: cuda: 1 failed step (out of memory)"),
        (Health({"cuda": AcceleratorHealth(shrunk=2)}), "shrunk: cuda: cache shrunk 2 times"),
        (FALLEN_BACK, "fallback: hybrid plans were given up for cpu_only"),
    ],
)
def test_it_is_said_in_a_word_and_counts(health: Health, said: str) -> None:
    assert what_happened(health) == said


@pytest.mark.parametrize("health", [FAILED, FALLEN_BACK])
def test_an_unclean_runtime_ends_a_benchmark_with_one_sentence(monkeypatch: pytest.MonkeyPatch, health: Health) -> None:
    runtime = Runtime.__new__(Runtime)
    monkeypatch.setattr(Runtime, "health", lambda self: health)
    with pytest.raises(SystemExit, match="no times: the run was not clean"):
        refuse_unless_clean(runtime)


def test_a_clean_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "health", lambda self: Health())
    refuse_unless_clean(Runtime.__new__(Runtime))


def test_overhead_prints_nothing_of_an_unclean_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Runtime, "health", lambda self: FAILED)
    monkeypatch.setattr("sys.argv", ["overhead", "--tokens", "2"])
    with pytest.raises(SystemExit, match="1 failed step"):
        overhead.main()
    assert capsys.readouterr().out == ""


def test_hybrid_prints_no_row_of_an_unclean_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Method:
        runtime = Runtime.__new__(Runtime)

    monkeypatch.setattr(Runtime, "health", lambda self: FAILED)
    monkeypatch.setattr(hybrid, "random_layer", lambda number: number)
    monkeypatch.setattr(hybrid, "calibrated", _profile)
    monkeypatch.setattr(hybrid, "compare", lambda *_: {"hybrid": Method()})
    monkeypatch.setattr("sys.argv", ["hybrid", "--tokens", "1", "--warm-up", "0"])
    with pytest.raises(SystemExit, match="1 failed step"):
        hybrid.main()
    assert "|" not in capsys.readouterr().out


def _profile(layers: Any, options: Any, folder: Any) -> Any:
    (folder / "profile.json").write_text("{}", encoding="utf-8")
    return folder / "profile.json", 0.0


def test_speed_reports_no_rate_of_an_unclean_run(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    monkeypatch.setattr(Runtime, "health", lambda self: FAILED)
    with pytest.raises(SystemExit, match="1 failed step"):
        speed.run_ours(tiny_model, 2, warm_up=1, grow=0, cpu_backend="torch_reference", accelerator="none")
