"""Failures that the CPU answered for are told: in a run's numbers, and in the note that outlives it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.host import last_runs
from hybrimoe_kt.host.last_runs import RunNote, failure_text, read_last_runs
from hybrimoe_kt.runtime.health import AcceleratorHealth, Health
from tests.support.generated_model import GeneratedModel, Shape

Make = Callable[[Shape], GeneratedModel]
GREEDY = Sampling(max_new_tokens=4, temperature=0)
PROMPT = [3, 5, 7, 11]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "last-runs.json"
    monkeypatch.setattr(last_runs, "state_path", lambda: path)
    return path


def build(generated: Make) -> Engine:
    options = {"accelerator": "emulated", "cache_size": "all", "cpu_backend": "torch_reference"}
    made = build_engine(generated(Shape()).path, progress=False, option_overrides=options)
    made.end_ids = set()
    return made


def fail_at(engine: Engine, monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Let the accelerator's experts fail at these launches."""
    gpu = engine.runtime.lanes[0].gpu
    launch, count = gpu.launch, 0

    def sometimes(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise RuntimeError("injected\nmore")
        launch(*args, **kwargs)

    monkeypatch.setattr(gpu, "launch", sometimes)


def test_a_clean_run(generated: Make, file: Path) -> None:
    engine = build(generated)
    list(engine.tokens(PROMPT, GREEDY))
    assert engine.last_run()["health"] == engine.statistics()["health"] == engine.runtime.health().as_dict()
    assert engine.last_run()["health"]["word"] == ""
    assert not file.exists() and not file.parent.exists()


def test_failed_steps_are_in_the_numbers_and_noted(
    generated: Make, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(build(generated).tokens(PROMPT, GREEDY))
    engine = build(generated)
    fail_at(engine, monkeypatch, 2, 4)
    assert list(engine.tokens(PROMPT, GREEDY)) == wanted
    for numbers in (engine.last_run(), engine.statistics()):
        json.dumps(numbers)
        assert numbers["health"]["word"] == "failed"
        assert numbers["health"]["accelerators"]["emulated"]["failed_steps"] == 2
    noted = read_last_runs()["emulated"]
    assert noted.pop("date")
    assert noted == {
        "model": engine.model_name, "failed_steps": 2, "shrunk": 0, "given_up": False, "last_failure": "injected",
    }  # fmt: skip
    list(build(generated).tokens(PROMPT, GREEDY))
    assert read_last_runs() == {}


def test_it_is_noted_while_the_answer_is_given(generated: Make, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has failed may take the process with it."""
    engine = build(generated)
    fail_at(engine, monkeypatch, 1, 2, 3)
    answer = engine.tokens(PROMPT, GREEDY)
    next(answer)
    assert read_last_runs()["emulated"]["failed_steps"] > 0
    assert list(file.parent.iterdir()) == [file], "nothing is left over beside it"
    assert list(answer)
    assert engine.last_run()["health"]["word"] == "abandoned"
    assert read_last_runs()["emulated"]["given_up"]


def test_given_text_is_a_run_as_well(generated: Make, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(generated)
    fail_at(engine, monkeypatch, 1)
    list(engine.feed(PROMPT, 2))
    assert read_last_runs()["emulated"]["failed_steps"] == 1


def test_a_folder_that_cannot_be_written_fails_no_run(
    generated: Make, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.write_text("a file where the folder should be")
    engine = build(generated)
    fail_at(engine, monkeypatch, 1)
    assert len(list(engine.tokens(PROMPT, GREEDY))) == 4


def test_other_accelerators_keep_their_notes(file: Path) -> None:
    RunNote("one").at_end(Health({"cuda": AcceleratorHealth(failed_steps=1), "cuda:1": AcceleratorHealth(shrunk=1)}))
    assert read_last_runs().keys() == {"cuda", "cuda:1"}
    RunNote("two").at_end(Health({"cuda": AcceleratorHealth()}))
    assert read_last_runs().keys() == {"cuda:1"}
    RunNote("three").at_end(Health())
    assert read_last_runs().keys() == {"cuda:1"}
    assert stat.S_ISREG(file.stat().st_mode)


def test_a_step_that_is_clean_takes_nothing_out(file: Path) -> None:
    """Only an answer that has ended shows that the accelerator works again."""
    RunNote("one").at_end(Health({"cuda": AcceleratorHealth(failed_steps=1)}))
    note = RunNote("two")
    note.at_step(Health({"cuda": AcceleratorHealth()}))
    assert read_last_runs()["cuda"]["model"] == "one"
    note.at_end(Health({"cuda": AcceleratorHealth()}))
    assert read_last_runs() == {}


@pytest.mark.parametrize(
    ("health", "text"),
    [
        (AcceleratorHealth(), ""),
        (AcceleratorHealth(failed_steps=1, last_failure="x"), "1 failed step (x)"),
        (AcceleratorHealth(failed_steps=2, shrunk=1), "2 failed steps, cache shrunk once"),
        (AcceleratorHealth(shrunk=3, given_up=True, last_failure="x"), "cache shrunk 3 times (x), given up"),
    ],
)
def test_in_words(health: AcceleratorHealth, text: str) -> None:
    assert failure_text(Health({"cuda": health}).as_dict()["accelerators"]["cuda"]) == text
