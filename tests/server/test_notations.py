"""Thoughts and tool calls of every notation: told apart as they stream, and written again into the next turn."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hybrimoe_kt.engine.answer import Request, answer
from hybrimoe_kt.engine.chat.call_notations import CALLS as NOTATIONS
from hybrimoe_kt.engine.events import Answer, Event, TextDelta
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.host.hf.architectures import every_architecture
from tests.support.notations import CALLS, CONTENT, ROWS, THOUGHT, TOOLS, Row, conversation

from .scripted import ScriptedEngine
from .serving import serving

ASKED = [{"role": "user", "content": "Weather? <think>"}]
FEW = ("hermes (Qwen3)", "Kimi-K2", "Mistral (7B v3, Mixtral)", "Gemma 4", "gpt-oss")
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def engine_of(row: Row, script: Callable[[str], str] = lambda prompt: "") -> ScriptedEngine:
    special = ("<|im_end|>", *row.special)
    return ScriptedEngine(script, chat_template=row.template, model_type=row.model_type, special=special)


def written(row: Row) -> str:
    """The answer as the model writes it: what the template writes of it, without what the template has begun."""
    engine = engine_of(row)
    texts = [
        str(engine.tokenizer.decode(engine.vocabulary.chat_ids(turns, TOOLS)))
        for turns in (conversation(row)[:1], conversation(row))
    ]
    asked = texts[0].removesuffix(row.begun)
    assert texts[1].startswith(asked)
    ends = ("[end]", "<|call|><|start|>assistant")
    return next(texts[1][len(asked) :].split(end)[0] for end in ends if end in texts[1]).removeprefix(row.begun)


def wanted(row: Row) -> tuple[str, str, list[tuple[str, Any]]]:
    return THOUGHT if row.has_thoughts else "", CONTENT if row.has_content else "", list(row.calls)


def told(answer: Answer) -> tuple[str, str, list[tuple[str, Any]]]:
    return answer.thoughts, answer.text, [(call.name, dict(call.arguments)) for call in answer.tool_calls]


def fed(row: Row, pieces: Iterator[str]) -> Answer:
    vocabulary = engine_of(row).vocabulary
    parts = vocabulary.response_parts(vocabulary.chat_ids(ASKED, TOOLS), TOOLS)
    assert parts is not None
    events: list[Event] = []
    for piece in pieces:
        events += parts.feed(piece)
    return Answer.of([*events, *parts.flush()])


def test_the_templates_are_of_the_notation() -> None:
    texts = {name: written(row) for name, row in ROWS.items()}
    assert "</think>\n\nLet me see.\n<tool_call>\n{" in texts["hermes (Qwen3)"].replace(".<tool", ".\n<tool")
    assert texts["gpt-oss"].startswith("<|channel|>analysis<|message|>The weather?")
    assert all(json.dumps(CALLS[1][1]) in texts[name] for name in ("Kimi-K2", "DeepSeek-V3.1", "Command A", "Hunyuan"))


@each_row
def test_token_by_token(row: Row) -> None:
    text = written(row)
    engine = engine_of(row, lambda prompt: text)
    prompt = engine.vocabulary.chat_ids(ASKED, TOOLS)
    assert str(engine.tokenizer.decode(prompt)).endswith(row.begun)
    parts = engine.vocabulary.response_parts(prompt, TOOLS)
    request = Request(prompt=prompt, sampling=Sampling(max_new_tokens=4000), parts=parts)
    engine.context_tokens = 9999
    events = list(answer(engine, request, threading.Event()))
    assert told(Answer.of(events)) == wanted(row)
    thoughts = [event for event in events if isinstance(event, TextDelta) and event.is_thought]
    assert len(thoughts) > 10 or not row.has_thoughts, "thoughts stream"


@each_row
def test_however_it_is_split(row: Row) -> None:
    text, draw = written(row), random.Random(5)
    assert told(fed(row, iter([text]))) == wanted(row)
    for _ in range(5):
        cuts = sorted(draw.sample(range(len(text)), 12))
        pieces = (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
        assert told(fed(row, pieces)) == wanted(row)


@each_row
def test_what_is_no_call_stays_content(row: Row) -> None:
    ended = "</think>" if row.begun else ""
    for pieces in ([ended + row.malformed], list(ended + row.malformed)):
        assert told(fed(row, iter(pieces))) == ("", row.malformed, [])


@each_row
def test_a_call_that_breaks_off_stays_content(row: Row) -> None:
    text = written(row)
    at = text.index("Z\u00fcrich") + 3
    cut = fed(row, iter(list(text[:at])))
    assert cut.tool_calls == ()
    assert (cut.thoughts, cut.text[-3:]) == (wanted(row)[0], text[at - 3 : at])
    assert cut.text.startswith(wanted(row)[1])


@each_row
def test_wherever_an_answer_ends_no_call_is_made_up(row: Row) -> None:
    """The longest answer may end behind any letter: a call is then one of those written, or none."""
    text = written(row)
    cuts = random.Random(3).sample(range(len(text)), min(60, len(text)))
    for cut in cuts:
        _, _, calls = told(fed(row, iter([text[:cut]])))
        assert calls == list(row.calls)[: len(calls)], text[:cut][-60:]


@each_row
def test_without_tools_nothing_is_a_call(row: Row) -> None:
    engine = engine_of(row, lambda prompt: written(row))
    engine.context_tokens = 9999
    prompt = engine.vocabulary.chat_ids(ASKED)
    parts = engine.vocabulary.response_parts(prompt)
    request = Request(prompt=prompt, sampling=Sampling(max_new_tokens=4000), parts=parts)
    said = Answer.of(answer(engine, request, threading.Event()))
    assert said.tool_calls == ()
    assert said.thoughts == wanted(row)[0]
    assert "by the <lake>" in said.text


@each_row
def test_into_the_next_turn(row: Row) -> None:
    """What was parsed is written by the template as the model wrote it; so it is with ids of other programs."""
    text = written(row)
    said = fed(row, iter([text]))
    for make_id in (lambda call: call.id or "call_1", lambda call: f"call_{call.name}", lambda call: None):
        calls = [
            {"id": make_id(call), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.tool_calls
        ]
        turn = {"role": "assistant", "content": said.text, "tool_calls": calls}
        turn |= {"reasoning_content": said.thoughts} if said.thoughts else {}
        result = {"role": "tool", "content": "sunny", "tool_call_id": make_id(said.tool_calls[0])}
        engine = engine_of(row)
        prompt = str(engine.tokenizer.decode(engine.vocabulary.chat_ids([*ASKED, turn, result], TOOLS)))
        assert _without_ids(text) in _without_ids(prompt)
        assert "sunny" in prompt


def _without_ids(text: str) -> str:
    """Mistral's and Solar's are new ones each time."""
    return re.sub(r'"id": "\w+"|(?<=tool_call:begin\|>)[\w.:]+', "", text)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name, marks=[] if name in FEW else pytest.mark.slow) for name, row in ROWS.items()]
)
def test_through_openais_interface_and_into_the_next_turn(row: Row) -> None:
    text = written(row)
    engine = engine_of(row, lambda prompt: text)
    engine.context_tokens = 9999
    with serving(engine) as running:
        body = {"messages": ASKED, "tools": TOOLS}
        choice = running.http.post("/v1/chat/completions", json=body).json()["choices"][0]
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert message.get("reasoning_content", "") == wanted(row)[0]
        assert (message["content"] or "") == wanted(row)[1]
        calls = [
            (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]
        ]
        assert calls == wanted(row)[2]
        pieces = _streamed(running.http.post("/v1/chat/completions", json=body | {"stream": True}).text)
        assert [piece["tool_calls"][0]["function"]["name"] for piece in pieces if "tool_calls" in piece] == [
            name for name, _ in row.calls
        ]
        for name, whole in (("reasoning_content", wanted(row)[0]), ("content", wanted(row)[1])):
            assert "".join(piece.get(name) or "" for piece in pieces) == whole
        answered = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
        running.http.post("/v1/chat/completions", json={"messages": [*ASKED, message, answered], "tools": TOOLS})
    replayed = engine.prompts[-1]
    assert text in replayed
    assert "sunny" in replayed


def _streamed(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line)["choices"][0]["delta"] for line in lines]


@pytest.mark.parametrize("row", [ROWS[name] for name in FEW], ids=FEW)
def test_through_ollamas_interface_and_into_the_next_turn(row: Row) -> None:
    text = written(row)
    engine = engine_of(row, lambda prompt: text)
    engine.context_tokens = 9999
    with serving(engine) as running:
        body = {"model": "scripted", "messages": ASKED, "tools": TOOLS}
        message = running.http.post("/api/chat", json=body | {"stream": False}).json()["message"]
        assert message.get("thinking", "") == wanted(row)[0]
        assert message["content"] == wanted(row)[1]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        assert calls == wanted(row)[2]
        lines = [json.loads(line)["message"] for line in running.http.post("/api/chat", json=body).text.splitlines()]
        assert "".join(line.get("thinking", "") for line in lines) == wanted(row)[0]
        assert sum(len(line.get("tool_calls", [])) for line in lines) == len(row.calls)
        answered = {"role": "tool", "tool_name": row.calls[0][0], "content": "sunny"}
        running.http.post("/api/chat", json=body | {"messages": [*ASKED, message, answered]})
    assert text in engine.prompts[-1]


@each_row
def test_pieces_make_no_difference_whatever_is_said(row: Row) -> None:
    """Made-up answers of marks and words: the same however they are cut, and no word of them gets lost."""
    draw = random.Random(7)
    text = written(row)
    marks = [*row.special, "<think>", "</think>", *re.findall(r"<[^>\n]{1,40}>|\[[A-Z_]+\]", text)]
    words = ["word", " ", "\n", "{", '"}', "\u5929", "time", text, row.malformed, '{"name": "time", "arguments": {}}']
    for _ in range(12):
        said = "".join(draw.choice(draw.choice((marks, words))) for _ in range(draw.randint(1, 12)))
        whole = fed(row, iter([said]))
        assert told(fed(row, iter(list(said)))) == told(whole), said
        kept = whole.thoughts + whole.text + json.dumps([call.arguments for call in whole.tool_calls])
        assert kept.count("word") == said.count("word"), said


def test_the_notation_that_a_family_names_is_known() -> None:
    named = {family.name: family.answer_format for family in every_architecture() if family.answer_format}
    assert set(named.values()) <= NOTATIONS.keys()
    assert named["gpt-oss"] == "harmony" and named["exaone-moe"] == "hermes"


def test_several_calls_have_ids_that_their_template_takes() -> None:
    row = ROWS["Mistral (Small 3.2, Magistral)"]
    calls = fed(row, iter([written(row)])).tool_calls
    assert len({call.id for call in calls}) == 3
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    kimi = fed(ROWS["Kimi-K2"], iter([written(ROWS["Kimi-K2"])])).tool_calls
    assert [call.id for call in kimi] == ["functions.weather:0", "functions.weather:1", "functions.time:2"]


def test_a_call_after_one_that_is_none_is_one() -> None:
    row = ROWS["hermes (Qwen3)"]
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    parts = fed(row, iter([f"One: {row.malformed} two: {call} three"]))
    assert told(parts) == ("", f"One: {row.malformed} two:three", [("time", {})])


def test_kimis_calls_end_its_thoughts() -> None:
    row = ROWS["Kimi-K2"]
    text = written(row).replace("</think>Let me see.", "")
    assert told(fed(row, iter([text]))) == (THOUGHT, "", list(CALLS))


def test_qwens_coder_may_leave_the_first_mark_out() -> None:
    row = ROWS["Qwen3-Coder"]
    text = "Now.\n<function=time>\n</function>\n</tool_call>"
    for pieces in ([text], list(text)):
        assert told(fed(row, iter(pieces))) == ("", "Now.", [("time", {})])


def test_values_as_python_writes_them_are_what_the_schema_says() -> None:
    text = (
        "<tool_call><function=weather><parameter=exact>True</parameter><parameter=where>{'a': [None]}</parameter>"
        "<parameter=days>3.0</parameter><parameter=ratio>nan</parameter><parameter=code>None</parameter>"
        "<parameter=other>7</parameter></function></tool_call>"
    )
    typed = {"exact": True, "where": {"a": [None]}, "days": 3, "ratio": "nan", "code": None, "other": "7"}
    assert told(fed(ROWS["Qwen3-Coder"], iter([text]))) == ("", "", [("weather", typed)])


def test_gemmas_template_shows_none_as_python_does() -> None:
    text = '<|tool_call>call:weather{where:{lat:None,tags:[True,<|"|>None<|"|>]},place:<|"|>a: b, {c}<|"|>}<tool_call|>'
    typed = {"where": {"lat": None, "tags": [True, "None"]}, "place": "a: b, {c}"}
    assert told(fed(ROWS["Gemma 4"], iter([text]))) == ("", "", [("weather", typed)])


def test_python_strings_may_have_several_lines() -> None:
    text = "<|tool_call_start|>[weather(place='one\ntwo \"three\"', days=-1)]<|tool_call_end|>"
    typed = {"place": 'one\ntwo "three"', "days": -1}
    assert told(fed(ROWS["LFM2"], iter([text]))) == ("", "", [("weather", typed)])


@pytest.mark.parametrize(
    "call",
    [
        "[weather(place=open('x'))]", "[weather(**{})]", "[(1)]", "[weather(days={1: 2})]", "[weather(days=1j)]",
        "weather(" * 500, "[weather(place=f'{x}')]", '{"name": "weather", "arguments": {"days": NaN}}',
    ],
)  # fmt: skip
def test_what_json_does_not_have_is_no_call(call: str) -> None:
    text = f"<|tool_call_start|>{call}<|tool_call_end|>"
    assert told(fed(ROWS["LFM2"], iter([text]))) == ("", text, [])


def test_channels_of_harmony_are_thoughts_and_answer() -> None:
    row = ROWS["gpt-oss"]
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Yes.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is <b>four</b>.\n 4"
    )
    for pieces in ([text], list(text)):
        assert told(fed(row, iter(pieces))) == ("Hm.Yes.", "I look.It is <b>four</b>.\n 4", [])
    called = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.time<|channel|>commentary json"
        "<|message|>{}<|call|>"
    )
    assert told(fed(row, iter([called]))) == ("Hm.", "", [("time", {})])
    assert told(fed(row, iter(["Four."]))) == ("", "Four.", [])
