"""The Python door: `import hybrimoe_kt` is light, what it promises is there, and the examples of its page run."""

from __future__ import annotations

import contextlib
import gc
import io
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

import hybrimoe_kt
from hybrimoe_kt import Answer, Engine, ExpertOptions, Sampling, load
from hybrimoe_kt.engine.events import ToolCall
from hybrimoe_kt.errors import CapacityError, ConfigError, ModelError, RuleError
from tests.server.scripted import ScriptedEngine

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(temperature=0, max_new_tokens=12)
TALK = [{"role": "user", "content": "What is a good name for a cat?"}]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(tiny_model, options=ExpertOptions(accelerator="none"))


def fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_the_package_and_its_options_stays_light() -> None:
    heavy = "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert fresh(f"import sys, hybrimoe_kt; {heavy}") == "[]"
    names = "from hybrimoe_kt import ExpertOptions, Sampling, load"
    assert fresh(f"import sys; {names}; ExpertOptions(); Sampling(); {heavy}") == "[]"


def test_every_promised_name_is_there_and_no_other() -> None:
    assert set(hybrimoe_kt.__all__) <= set(dir(hybrimoe_kt))
    for name in hybrimoe_kt.__all__:
        assert getattr(hybrimoe_kt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        hybrimoe_kt.Engin  # noqa: B018
    assert fresh("from hybrimoe_kt import *; print(Engine.__name__, load.__name__)") == "Engine load"


def test_a_text_is_a_users_message_and_a_stream_is_the_answer_in_pieces(engine: Engine) -> None:
    answer = engine.chat(TALK, sampling=GREEDY)
    assert isinstance(answer, Answer)
    assert answer.text == str(answer) == engine.chat(TALK[0]["content"], sampling=GREEDY).text
    assert answer.text.strip()
    assert answer.run["new_tokens"] == 12
    assert answer.reason == "length"
    pieces = list(engine.stream(TALK, sampling=GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text
    assert engine.last_run()["reused_tokens"] > 0


def test_completions_take_text_or_token_ids(engine: Engine) -> None:
    whole = engine.complete("Once upon a time", sampling=GREEDY)
    assert whole.text == engine.complete(engine.vocabulary.text_ids("Once upon a time"), sampling=GREEDY).text
    end = whole.text[4:7]
    cut = engine.complete("Once upon a time", sampling=GREEDY, stop_strings=[end])
    assert (cut.text, cut.reason) == (whole.text[: whole.text.index(end)], "stop")


def test_log_probabilities_come_when_asked_for(engine: Engine) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=5, num_logprobs=2)
    answer = engine.chat("Hello!", sampling=sampling)
    assert len(answer.sampled) == answer.run["new_tokens"] > 0
    assert all(sampled.likeliest[0] == (sampled.token, sampled.logprob) for sampled in answer.sampled)
    assert engine.chat("Hello!", sampling=GREEDY).sampled == ()


def test_an_event_ends_an_answer(engine: Engine) -> None:
    stop = threading.Event()
    pieces = []
    for piece in engine.stream("Tell me a story.", stop=stop):
        pieces.append(piece)
        stop.set()
    assert len(pieces) <= 2
    assert engine.last_run()["finish"] == "cancelled"
    assert engine.chat("Hello!", sampling=GREEDY, stop=stop).reason == "cancelled"


class Scripted(ScriptedEngine, Engine):
    """An engine that says what is written down, in Qwen's notation."""


def test_thoughts_and_tool_calls_are_told_apart() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call>'
    engine = Scripted(lambda prompt: f"<think>hmm</think>Let me see.{call}")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    answer = engine.chat("How is it in Bern?", tools=[tool])
    assert (answer.text, answer.thoughts, answer.reason) == ("Let me see.", "hmm", "tool_calls")
    assert answer.tool_calls == (ToolCall("weather", {"place": "Bern"}),)
    assert "weather" in engine.prompts[-1]
    assert "".join(engine.stream("Hi")) == engine.chat("Hi").text == f"Let me see.{call}"


def test_a_stream_leaves_thoughts_out_unless_all_is_wanted() -> None:
    engine = Scripted(lambda prompt: "yes" if "</think>" in prompt else "<think>hmm</think>yes")
    assert "".join(engine.stream("Hi")) == "yes"
    assert engine.chat("Hi").thoughts == "hmm"
    assert engine.chat("Hi", template_options={"enable_thinking": False}).thoughts == ""
    assert "".join(engine.stream("Hi", as_written=True)) == "hmmyes"  # the marks are special tokens here


def test_what_cannot_be_is_said_before_anything_is_computed(engine: Engine) -> None:
    before = engine.statistics()
    for begin in (engine.chat, engine.stream, engine.complete):
        with pytest.raises(CapacityError, match="the context holds"):
            begin("word " * 5000)
    with pytest.raises(CapacityError, match="empty"):
        engine.complete("")
    with pytest.raises(ModelError, match="token 1000000"):
        engine.complete([1, 1000000])
    with pytest.raises(ConfigError, match="no option 'enable_thinking'"):
        engine.chat("Hello!", template_options={"enable_thinking": False})
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(ConfigError, match="leave out tools"):
        engine.chat("Hello!", tools=[tool])
    assert engine.statistics() == before


def test_nothing_needs_closing(tiny_model: Path) -> None:
    engine = load(tiny_model, options=ExpertOptions(accelerator="emulated", cache_size="50%"))
    engine.chat("Hello!", sampling=GREEDY)
    gone = [weakref.ref(part) for part in (engine, engine.model, engine.runtime)]
    del engine
    gc.collect()
    assert [part() for part in gone] == [None] * 3


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": -1}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": -0.1}, {"top_p": 1.5},
     {"top_k": -1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"num_logprobs": -1}],
)  # fmt: skip
def test_sampling_that_cannot_be_names_its_option(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*, valid:"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_options_win_over_the_rules_where_they_are_set(tiny_model: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "- match: {name: '^model\\.layers\\.\\d+\\.mlp\\.experts$'}\n"
        "  replace:\n"
        "    class: hybrimoe_kt.operators.experts.HybriMoEExperts\n"
        "    kwargs: {policy: lru, prefetch_size: 1, accelerator: none}\n"
        "  recursive: false\n"
    )
    assert ExpertOptions().changed() == {}
    options = load(tiny_model, rules=rules, options=ExpertOptions(policy="lfu")).runtime.options
    assert (options.policy, options.prefetch_size, options.accelerator) == ("lfu", 1, "none")
    rules.write_text("nonsense")
    with pytest.raises(RuleError):
        load(tiny_model, rules=rules)


def test_arguments_of_load_are_checked(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'float8'"):
        load(tiny_model, dtype="float8")
    with pytest.raises(ConfigError, match="context_tokens is 0"):
        load(tiny_model, context_tokens=0)
    with pytest.raises(ModelError, match="no-such"):
        load("no-such.gguf")


def examples() -> Iterator[str]:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    yield from re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_examples_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = list(examples())
    assert len(blocks) >= 8
    for number, block in enumerate(blocks):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile(block, f"docs/python.md, example {number}", "exec"), names)
        assert "print(" not in block or shown.getvalue().strip(), block


@pytest.mark.slow
def test_a_type_checker_finds_nothing_wrong_with_the_examples(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "user.py"
    file.write_text("\n".join(examples()) + "\nreveal_type(load)\nreveal_type(answer)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "-> hybrimoe_kt.engine.engine.Engine" in done.stdout
    assert 'Revealed type is "hybrimoe_kt.engine.events.Answer"' in done.stdout
