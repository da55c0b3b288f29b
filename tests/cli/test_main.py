"""The `ktransformers` command: in processes of its own where that matters, else in this one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from hybrimoe_kt.cli import loading
from hybrimoe_kt.cli import main as command
from hybrimoe_kt.cli.main import main
from hybrimoe_kt.runtime.health import AcceleratorHealth, Health
from tests.support.timelines import check

REQUIRED = {"prefill_tokens_per_s", "decode_tokens_per_s", "hit_rate", "experts_on_cpu", "experts_on_gpu"}
REQUIRED |= {"transfers", "text"}


class Answered(NamedTuple):
    """A command that ended with code 0."""

    stdout: str
    stderr: str
    report: dict[str, Any]


Ask = Callable[..., Answered]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[Answered]:
    """The same question to two processes of their own, as a user starts them; the second is given rules in a file.

    No more than two: each takes seconds to import torch.
    """
    folder = tmp_path_factory.mktemp("processes")
    rules = _rules(folder)
    rules.write_text(rules.read_text() + "- match: {name: '^never$'}\n  replace: {class: default}\n", encoding="utf-8")
    ended = []
    for more in ([], ["--optimize_config_path", str(rules)]):
        report = folder / "stats.json"
        command = [sys.executable, "-m", "hybrimoe_kt", *DRAWN, "5", "--stats-json", str(report), *more]
        done = subprocess.run(command, input=b"", capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr.decode()
        told = json.loads(report.read_text(encoding="utf-8"))
        ended.append(Answered(done.stdout.decode(), done.stderr.decode(), told))
    return ended


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run a command in this process."""

    def answer(*arguments: str | Path, stdin: str = "") -> Answered:
        report = tmp_path / "stats.json"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        assert main([*map(str, arguments), "--stats-json", str(report)]) == 0
        printed = capsys.readouterr()
        return Answered(printed.out, printed.err, json.loads(report.read_text(encoding="utf-8")))

    return answer


DRAWN = ["--prompt", "Hello! How are you today?", "--temperature", "1", "--max_new_tokens", "12", "--seed"]
GREEDY = ["--max_new_tokens", "8", "--temperature", "0"]


def test_one_answer_is_all_of_standard_output(processes: list[Answered]) -> None:
    for text, _, report in processes:
        assert report.keys() >= REQUIRED
        assert text == report["text"] + "\n"
        assert report["new_tokens"] > 3
        assert report["experts_on_gpu"] == report["transfers"] == 0
        assert report["experts_on_cpu"] > 0


def test_the_emulated_accelerator_takes_the_same_path(ask: Ask) -> None:
    asked = ["--prompt", "Good morning.", "--cpu_backend", "torch_reference", *GREEDY]
    plain = ask(*asked)
    emulated = ask(*asked, "--accelerator", "emulated", "--cache_size", "25%", "--prefetch_size", "2", "--verbose")
    assert emulated.stdout == plain.stdout
    report = emulated.report
    assert report["experts_on_gpu"] > 0
    assert 0 < report["hit_rate"] < 1
    assert report["per_token_ms"].keys() == {"experts", "attention", "replay", "overhead", "other", "total"}


def test_the_next_run_goes_on_from_the_last(tmp_path: Path, ask: Ask) -> None:
    asked = ["--prompt", "Good morning.", *GREEDY]
    kept = ["--kept_path", tmp_path / "kept"]
    first, second, without = ask(*asked, *kept), ask(*asked, *kept), ask(*asked)
    assert "0 conversations to go on from" in first.stderr and "1 conversation kept in" in first.stderr
    assert "1 conversation to go on from" in second.stderr
    assert first.report["reused_tokens"] == without.report["reused_tokens"] == 0
    assert second.report["reused_tokens"] == second.report["prompt_tokens"] - 1
    assert first.stdout == second.stdout == without.stdout


def test_a_prompt_may_come_from_a_pipe_or_a_file_and_flags_may_have_hyphens(tmp_path: Path, ask: Ask) -> None:
    piped = ask("--cpu-infer", "1", *GREEDY, stdin="Good morning.")
    file = tmp_path / "prompt.txt"
    file.write_text("Good morning.", encoding="utf-8")
    from_file = ask("--prompt-file", file, "--use_cuda_graph", "False", *GREEDY)
    assert piped.stdout == from_file.stdout


def test_the_same_seed_draws_the_same_answer(processes: list[Answered], ask: Ask) -> None:
    first, again = processes
    assert first.stdout == again.stdout
    here, other = ask(*DRAWN, "5"), ask(*DRAWN, "6")
    assert here.stdout == ask(*DRAWN, "5").stdout != other.stdout


def _written(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


EXPERTS = "hybrimoe_kt.operators.experts.HybriMoEExperts"


def _rules(tmp_path: Path, kwargs: str = "{}", cls: str = EXPERTS) -> Path:
    text = f"- match: {{name: 'mlp\\.experts$'}}\n  replace: {{class: {cls}, kwargs: {kwargs}}}\n  recursive: false\n"
    return _written(tmp_path, "rules.yaml", text)


BAD = {
    "missing file": (lambda t, e: ["--gguf_path", t / "nothing.gguf"], "no such file"),
    "not GGUF": (lambda t, e: ["--gguf_path", _written(t, "x.gguf", b"PK" * 500)], "not a GGUF file"),
    "truncated header": (lambda t, e: ["--gguf_path", _written(t, "x.gguf", e.read_bytes()[:5000])], "truncated"),
    "truncated data": (lambda t, e: ["--gguf_path", _written(t, "x.gguf", e.read_bytes()[:9_000_000])], "truncated"),
    "missing split": (lambda t, e: ["--gguf_path", _written(t, "m-00001-of-00003.gguf", b"")], "2 of 3 splits missing"),
    "empty directory": (lambda t, e: ["--gguf_path", t], "no .gguf file"),
    "no configuration": (lambda t, e: ["--gguf_path", e, "--model_path", t], "no config.json"),
    "missing rules": (lambda t, e: ["--optimize_rule_path", t / "r.yaml"], "r.yaml"),
    "rules not YAML": (lambda t, e: ["--optimize_rule_path", _written(t, "r.yaml", "- match: [")], "r.yaml:1"),
    "unknown class": (lambda t, e: ["--optimize_rule_path", _rules(t, cls=EXPERTS[:-4])], "HybriMoEExperts"),
    "unknown kwarg": (lambda t, e: ["--optimize_rule_path", _rules(t, "{cach_size: 3}")], "did you mean 'cache_size'"),
    "no experts rule": (lambda t, e: ["--optimize_rule_path", _rules(t, cls="default")], "HybriMoEExperts"),
    "cache size": (lambda t, e: ["--accelerator", "emulated", "--cache_size", "lots"], "'lots' is not understood"),
    "cache too large": (lambda t, e: ["--accelerator", "emulated", "--cache_size", "900TB"], "smaller cache_size"),
    "unknown policy": (lambda t, e: ["--accelerator", "emulated", "--policy", "lruu"], "did you mean 'lru'"),
    "unknown accelerator": (lambda t, e: ["--accelerator", "emulatd"], "did you mean 'emulated'"),
    "unknown flag": (lambda t, e: ["--max_new_token", "3"], "--max_new_tokens"),
    "not a number": (lambda t, e: ["--max_new_tokens", "ten"], "'ten' is not a whole number"),
    "not a digit": (lambda t, e: ["--max_new_tokens", "²"], "'²' is not a whole number of at least 1"),
    "two signs": (lambda t, e: ["--max_new_tokens=--3"], "'--3' is not a whole number"),
    "seed too large": (lambda t, e: ["--seed", str(2**63)], "is not a whole number from -1 to"),
    "prompt not UTF-8": (lambda t, e: ["--prompt_file", _written(t, "p.txt", b"\xff\xfe hello")], "not UTF-8"),
    "empty prompt": (lambda t, e: ["--prompt_file", _written(t, "p.txt", b"  \n")], "no text"),
    "two prompts": (lambda t, e: ["--prompt", "a", "--prompt_file", "b"], "not both"),
    "context overflow": (lambda t, e: ["--prompt", "very long " * 2000], "context holds 1024"),
    "stats name too long": (lambda t, e: ["--prompt", "a", "--stats_json", t / ("n" * 300)], "File name too long"),
    "model path too long": (lambda t, e: ["--model_path", t / ("n" * 300)], "File name too long"),
    "model path missing": (lambda t, e: ["--model_path", t / "none"], "No such file"),
    "kept path is a file": (lambda t, e: ["--kept_path", _written(t, "kept", b"")], "give another folder"),
    "stats not writable": (lambda t, e: ["--prompt", "a", "--stats-json", t / "no" / "such.json"], "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, embedded_model: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where a traceback is an exception: importing torch anew takes seconds."""
    arguments, wanted = BAD[case]
    given = [str(argument) for argument in arguments(tmp_path, embedded_model)]
    if not any(argument.startswith("--prompt") for argument in given):
        given += ["--prompt", "Hello"]
    try:
        code = main(given)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("ktransformers: error: ")
    assert wanted in last
    assert printed.out == ""


def test_a_rule_that_matches_nothing_is_a_warning(processes: list[Answered]) -> None:
    plain, with_rules = processes
    assert "rule 2 matches no module" in with_rules.stderr
    assert "matches no module" not in plain.stderr


def test_help_shows_an_example() -> None:
    done = subprocess.run([sys.executable, "-m", "hybrimoe_kt", "--help"], capture_output=True, text=True, check=True)
    assert "ktransformers --gguf_path" in done.stdout


class FakeEngine:
    """Answers at once, with a name and a text that nobody should print as they are."""

    model_name = "x [/red] \x1b[2J"
    shares = None
    context_tokens = 64
    runtime = SimpleNamespace(accelerators=(), describe=lambda: "experts on the CPU")
    loaded = SimpleNamespace(plans={})
    heard: str

    def stream(self, messages: list[dict[str, str]], **sampling: Any) -> Iterator[str]:
        self.heard = messages[-1]["content"]
        yield from ("a\tb \x1b]0;t", "itle\x07 c")

    def last_run(self) -> dict[str, Any]:
        counts = dict.fromkeys(REQUIRED | {"prompt_tokens", "new_tokens", "reused_tokens", "prefetches"} - {"text"}, 1)
        return counts | {"reused_tokens": 0}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(loading, "load_engine", lambda options, console: fake)
    return fake


def test_what_a_model_says_cannot_steer_the_terminal(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompt", "Hi", "--stats_json", str(tmp_path / "s.json")]) == 0
    printed = capsys.readouterr()
    assert printed.out == "a\tb ]0;title c\n"
    assert "x [/red] [2J: experts on the CPU" in printed.err
    assert json.loads((tmp_path / "s.json").read_text())["text"] == "a\tb \x1b]0;title\x07 c"


def test_a_code_page_that_lacks_a_character_gets_a_question_mark(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.stream = lambda messages, **sampling: iter(["né ", "→ 猫"])  # type: ignore[method-assign, assignment]
    with monkeypatch.context() as patch:
        page = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        patch.setattr(sys, "stdout", page)
        assert main(["--prompt", "Hi"]) == 0
    assert page.buffer.getvalue() == "né ? ?\n".encode("cp1252")


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail with exit code 2, and return its last line."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def test_an_effort_that_the_model_does_not_know_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "--prompt", "hi", "--reasoning_effort", "high")
    assert "--reasoning_effort high: the chat template of" in said and "has no such option" in said


@needs_full
def test_output_that_cannot_be_written_is_one_sentence(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--stats_json /dev/full: No space left" in failure(capsys, "--prompt", "Hi", "--stats_json", "/dev/full")
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert "to standard output: No space left" in failure(capsys, "--prompt", "Hi")


@pytest.mark.parametrize("verbose", [False, True])
def test_failures_that_the_cpu_answered_for_are_said(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    told = engine.last_run() | {"health": Health({"cuda": AcceleratorHealth(failed_steps=2)}).as_dict()}
    monkeypatch.setattr(engine, "last_run", lambda: told)
    if verbose:
        zero = dict.fromkeys(("experts", "attention", "overhead", "other", "total"), 0.0)
        monkeypatch.setattr(engine, "shares", SimpleNamespace(per_token_ms=lambda: zero))
    assert main(["--prompt", "Hi"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert next(line for line in lines if line.startswith("prompt ")).endswith(" prefetches; failed")
    assert ("since the start: cuda: 2 failed steps" in lines) is verbose


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_chat_needs_a_terminal_on_both_sides(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = Terminal()
    monkeypatch.setattr(typed, "buffer", io.BytesIO(b"typed"), raising=False)
    for stdin, heard in ((typed, "typed"), (None, "Hello! How are you today?")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main([]) == 0
        assert engine.heard == heard
    assert "answering 'Hello! How are you today?'" in capsys.readouterr().err


def test_a_prompt_that_is_not_unicode_reaches_the_model_with_marks(engine: FakeEngine) -> None:
    assert main(["--prompt", "caf\udce9 \ud800"]) == 0
    assert engine.heard == "caf? ?"


def test_options_that_the_model_cannot_follow_are_noted(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--prompt", "Hi", "--cache_size", "4", "--prefetch_size", "1", "--cache_lens", "99"]
    assert main(given) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: --cache_size has no effect without an accelerator",
        "note: --prefetch_size has no effect without an accelerator",
        "note: --cache_lens 99: the model's limit is 64 tokens",
    ]
    monkeypatch.setattr(engine, "runtime", SimpleNamespace(accelerators=("emulated",), describe=lambda: "slots"))
    assert main(given[:-2]) == 0
    assert "note: " not in capsys.readouterr().err


def test_a_chat_reports_its_last_answer(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Typed:
        def __init__(self) -> None:
            self.messages = ["first", "second"]

        def read(self) -> str:
            if not self.messages:
                raise EOFError
            return self.messages.pop(0)

    shares = dict.fromkeys(("experts", "attention", "overhead", "other", "total"), 0.5)
    monkeypatch.setattr(engine, "shares", SimpleNamespace(per_token_ms=lambda: shares))
    monkeypatch.setattr("hybrimoe_kt.cli.chat_input.MessagePrompt", Typed)
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: True)
    assert main(["--verbose", "--stats_json", str(tmp_path / "s.json")]) == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert engine.heard == "second"
    assert report.keys() >= REQUIRED | {"model", "runtime", "per_token_ms"}
    assert report["text"] == "a\tb \x1b]0;title\x07 c"
    assert capsys.readouterr().out.count("a token took 0.50 ms") == 2


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "longest"), [(_Terminal(), 40), (io.StringIO(), 10**6)], ids=["terminal", "file"])
def test_messages_break_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, longest: int
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    command.message_console().print("scheduler, policy, profile " * 9, markup=False)
    lines = stream.getvalue().splitlines()
    assert (len(lines) == 1) == (longest > 1000)
    assert all(len(line) <= longest for line in lines)
    assert {word for line in lines for word in line.split()} == {"scheduler,", "policy,", "profile"}


def test_a_timeline_of_the_answer_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    asked = ["--prompt", "Good morning.", "--max_new_tokens", "4", "--temperature", "0", "--timeline", str(file)]
    assert main([*asked, "--cpu_backend", "torch_reference"]) == 0
    assert str(file) in capsys.readouterr().err
    lanes = check(file, {"steps", "scheduler", "CPU"})
    assert lanes["steps"][0]["name"].startswith("prefill ") and len(lanes["steps"]) >= 2


def test_a_timeline_that_cannot_be_written_is_refused_before_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    assert main(["--prompt", "Hi", "--timeline", "/nowhere/run.json"]) == 2
    assert "--timeline /nowhere/run.json: cannot be written there" in capsys.readouterr().err


def test_the_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "examples:" in lines
    assert [line for line in lines if len(line) > 80] == []
