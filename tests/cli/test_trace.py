"""`hybrimoe trace` as a user meets it: texts, answers and chats become files that replay."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrimoe_kt.cli import chat_input, trace
from hybrimoe_kt.cli.tools import main
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.sim.record import Recorder
from hybrimoe_kt.sim.trace_file import read_trace
from tests.support.timelines import check

TEXT = "The river ran past the old mill, and the miller counted every stone that the water had moved. " * 3
EMULATED = ["--accelerator", "emulated", "--cpu_backend", "torch_reference", "--cache-size", "8"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def record(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code = main(["trace", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


def test_a_text_token_by_token_replays_with_the_run_s_own_counts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    file = tmp_path / "run.npz"
    timeline = tmp_path / "run.json"
    arguments = ["--tokens", "24", *EMULATED, "--prefetch_depth", "1", "--timeline", timeline]
    report = record(capsys, "--out", file, "--text", text, *arguments)
    lanes = check(timeline, {"steps", "scheduler", "GPU 0", "CPU", "link 0"})
    assert len(lanes["steps"]) == 24
    found = read_trace(file)
    assert [(step.phase, step.num_tokens) for step in found.steps] == [("decode", 1)] * 24
    assert report["locality"]["num_tokens"] == 24
    assert report["num_bytes"] == file.stat().st_size
    assert found.depth == 3, "gates are asked further than this run looked"
    assert report["counters"]["num_transfers"] > 0 and report["counters"]["num_prefetches"] > 0

    assert main(["simulate", "--trace", str(file), "--method", "recorded", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["recorded"] == report["counters"] == {key: replayed["statistics"][key] for key in trace.COUNTERS}
    assert 0 < replayed["hit_rate"] == report["counters"]["hit_rate"] < 1


def test_a_prompt_in_chunks_is_prefill_and_keeps_every_token_s_scores(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    file = tmp_path / "run.npz"
    arguments = ["--as", "prefill", "--chunk_size", "8", "--tokens", "17", "--cpu_backend", "torch_reference"]
    report = record(capsys, "--out", file, "--text", text, *arguments)
    found = read_trace(file)
    assert [(step.phase, step.num_tokens) for step in found.steps] == [("prefill", count) for count in (8, 8, 1)]
    assert found.token_scores is not None and found.scores is not None
    np.testing.assert_allclose(found.token_scores.astype(np.float32).sum(axis=2), 1, atol=1e-2)
    np.testing.assert_allclose(found.token_scores[:8].astype(np.float32).mean(axis=0), found.scores[0], atol=1e-3)
    np.testing.assert_array_equal(found.token_scores[16].astype(np.float32), found.scores[2])
    best = np.argsort(-found.token_scores.astype(np.float32), axis=2)[:, :, 0]
    assert (found.experts == best[..., None]).any(axis=2).mean() > 0.99, "the likeliest expert is chosen"
    assert report["counters"]["experts_on_gpu"] == 0
    assert "reuse" in report["locality"]

    assert main(["simulate", "--trace", str(file), "--method", "recorded"]) == 2
    assert "every expert on the CPU; give --cache" in capsys.readouterr().err
    assert main(["simulate", "--trace", str(file), "--cache", "8", "--json"]) == 0


def test_an_answer_is_recorded_with_its_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--prompt", "Good morning.", "--max_new_tokens", "6", "--temperature", "0"]
    assert main(["trace", "--out", str(tmp_path / "run"), *asked, *EMULATED]) == 0
    out, _ = capsys.readouterr()
    found = read_trace(tmp_path / "run.npz")
    assert [step.phase for step in found.steps[:2]] == ["prefill", "decode"]
    for words in ("hit rate", "by their gates", "entropy", str(tmp_path / "run.npz")):
        assert words in out
    report = record(capsys, "--out", tmp_path / "again", *asked, *EMULATED)
    assert out.startswith(report["text"] + "\n")


def test_a_chat_is_a_session_of_requests(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Messages:
        waiting = iter(("Hello!", "And you?"))

        def read(self) -> str:
            try:
                return next(self.waiting)
            except StopIteration:
                raise EOFError from None

    monkeypatch.setattr(chat_input, "MessagePrompt", Messages)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    code = main(
        ["trace", "--out", str(tmp_path / "chat.npz"), "--max_new_tokens", "4", "--temperature", "0", *EMULATED]
    )
    assert code == 0, capsys.readouterr().err
    assert {step.request for step in read_trace(tmp_path / "chat.npz").steps} == {0, 1}


def test_ctrl_c_keeps_what_was_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, steps = Recorder.begin_step, []

    def begin_step(self: Recorder, phase: Any) -> None:
        steps.append(phase)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        begin(self, phase)

    monkeypatch.setattr(Recorder, "begin_step", begin_step)
    file = tmp_path / "run.npz"
    assert main(["trace", "--out", str(file), "--text", str(text), "--cpu_backend", "torch_reference"]) == 130
    assert len(read_trace(file).steps) == 5
    assert str(file) in capsys.readouterr().out


def test_an_error_keeps_what_was_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, steps = Recorder.begin_step, []

    def begin_step(self: Recorder, phase: Any) -> None:
        steps.append(phase)
        if len(steps) == 4:
            raise KernelError("a kernel failed")
        begin(self, phase)

    monkeypatch.setattr(Recorder, "begin_step", begin_step)
    file = tmp_path / "run.npz"
    assert main(["trace", "--out", str(file), "--text", str(text), "--cpu_backend", "torch_reference"]) == 2
    assert len(read_trace(file).steps) == 3
    err = capsys.readouterr().err
    assert f"recorded until then: {file}" in err and "hybrimoe trace: a kernel failed\n" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--out"),
        (["--out", "/nowhere/run.npz", "--prompt", "Hi"], "--out /nowhere/run.npz: cannot be written there"),
        (["--out", "TMP/run", "--text", "TMP/none.txt"], "none.txt: No such file or directory; --text"),
        (["--out", "TMP/run", "--prompt", " "], "--prompt holds no text"),
        (["--out", "TMP/run", "--prompt", "Hi", "--text", "x"], "--text or --prompt, not both"),
        (["--out", "TMP/run", "--prompt", "Hi", "--tokens", "5"], "--tokens shortens a --text"),
        (["--out", "TMP/run"], "nothing to record: give --text FILE or --prompt TEXT"),
        (["--out", "TMP/run", "--prompt", "Hi", "--depth", "4"], "'4' is not a whole number from 1 to 3"),
        (["--out", "TMP/run", "--prompt", "Hi", "--polcy", "lru"], "did you mean '--policy'"),
        (["--out", "TMP/run", "--prompt", "Hi", "--policy", "lrw"], "lrw"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(trace, "load_engine", load)
    try:
        code = main(["trace", *(word.replace("TMP", str(tmp_path)) for word in arguments)])
    except SystemExit as exit:
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("hybrimoe trace: ")
    assert err.count("\n") == 1
    assert words in err
    assert not list(tmp_path.iterdir())


def test_a_trace_without_a_run_cannot_be_replayed_as_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[1] / "data" / "traces" / "gemma4-26b-a4b.npz"
    assert main(["simulate", "--trace", str(file), "--method", "recorded"]) == 2
    assert "does not say how it was recorded" in capsys.readouterr().err
