"""What docs/server.md says is refused is refused for that reason, and what it says is taken is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from hybrimoe_kt.server import anthropic_input, responses_tools
from hybrimoe_kt.server.anthropic_input import ANTHROPIC
from hybrimoe_kt.server.openai_schema import ChatRequest
from hybrimoe_kt.server.responses_input import RESPONSES
from hybrimoe_kt.server.unsupported import OLLAMA, OPENAI, Unsupported

from .scripted import ScriptedEngine
from .serving import ROOT, Serving, serving
from .test_values import HI

PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
OFF = (None, False, 0, "", [], {})
TABLES = {"OpenAI": OPENAI, "Ollama": OLLAMA, "Responses": RESPONSES, "Messages": ANTHROPIC}
HEADINGS = {"Responses": "### OpenAI's Responses", "Messages": "### Anthropic's Messages"}


def rows_below(heading: str) -> Iterator[list[str]]:
    """The cells of a table's rows."""
    section = PAGE.split(f"\n{heading}\n")[1].split("\n#")[0]
    for line in re.findall(r"^\| `(.*) \|$", section, re.MULTILINE):
        yield ("`" + line).split(" | ")


def documented(interface: str) -> dict[str, tuple[list[Any], str]]:
    """Field -> the values that are taken, and why others are refused."""
    said = {}
    for names, taken, reason in rows_below(HEADINGS.get(interface, f"### {interface}'s interface")):
        values = [json.loads(value) for value in re.findall(r"`([^`]+)`", taken)]
        for name in re.findall(r"`(\w+)`", names):
            said[name] = ([*values, *(OFF if taken.startswith("off") else (None,))], reason)
    return said


@pytest.fixture(scope="module")
def short() -> Iterator[Serving]:
    with serving(ScriptedEngine(lambda prompt: "ok")) as running:
        yield running


def body_with(interface: str, name: str, value: Any, *, option: bool = False) -> tuple[str, dict[str, Any]]:
    """A request with one field more, at the endpoint where it is no field of its own."""
    if interface == "Ollama":
        more = {"options": {name: value}} if option else {name: value}
        return "/api/generate", {"model": "scripted", "prompt": "hi", "stream": False, **more}
    if interface == "Responses":
        return "/v1/responses", {"input": "hi", name: value}
    if interface == "Messages":
        return "/v1/messages", {"max_tokens": 9, "messages": HI, name: value}
    if name in ChatRequest.model_fields:
        return "/v1/completions", {"prompt": "hi", name: value}
    return "/v1/chat/completions", {"messages": HI, name: value}


@pytest.mark.parametrize("interface", TABLES)
def test_the_page_lists_every_field_with_its_reason(interface: str) -> None:
    table: tuple[Unsupported, ...] = TABLES[interface]
    known = {name: row.reason for row in table for name in row.names}
    assert {name: reason for name, (_, reason) in documented(interface).items()} == known


@pytest.mark.parametrize(
    ("interface", "name"), [(interface, name) for interface in TABLES for name in documented(interface)]
)
def test_each_is_taken_or_refused_as_the_page_says(short: Serving, interface: str, name: str) -> None:
    taken, reason = documented(interface)[name]
    for value in taken:
        path, body = body_with(interface, name, value)
        answer = short.post(path, body)
        assert answer.status_code == 200, (value, answer.text)
    for option in (False, True)[: 1 + (interface == "Ollama")]:
        path, body = body_with(interface, name, {"other": 1}, option=option)
        answer = short.post(path, body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert f"{name} is not supported: {reason}" == (error if interface == "Ollama" else error["message"])


def documented_tools(interface: str) -> dict[str, str]:
    """Type of a tool -> why it is refused."""
    rows = rows_below(f"#### Tools of {interface}")
    return {name: reason for names, reason in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_page_lists_every_tool_that_is_refused_by_name() -> None:
    assert documented_tools("Responses") == responses_tools.TOOLS
    assert documented_tools("Messages") == anthropic_input.TOOLS


@pytest.mark.parametrize("name", responses_tools.TOOLS)
def test_each_tool_of_responses_is_refused_as_the_page_says(short: Serving, name: str) -> None:
    answer = short.post("/v1/responses", {"input": "hi", "tools": [{"type": name}]})
    wanted = f"tools of type {name!r} are not supported: {documented_tools('Responses')[name]}"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, wanted)


@pytest.mark.parametrize("name", anthropic_input.TOOLS)
@pytest.mark.parametrize("end", ["_20250305", "_bm25_20251119", ""])
def test_each_tool_of_messages_is_refused_as_the_page_says(short: Serving, name: str, end: str) -> None:
    answer = short.post("/v1/messages", {"messages": HI, "tools": [{"type": name + end, "name": "x"}]})
    wanted = f"tools of type {name + end!r} are not supported: {documented_tools('Messages')[name]}"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, wanted)


def test_what_agents_are_configured_with_leads_here(short: Serving) -> None:
    section = PAGE.split("\n## Coding agents\n")[1].split("\n## ")[0]
    ours = "http://127.0.0.1:10002"
    codex, claude = (found[1] for found in re.finditer(r"^(?:base_url = \"|export ANTHROPIC_BASE_URL=)([^\"\n]+)",
                                                       section, re.MULTILINE))  # fmt: skip
    assert short.post(codex.removeprefix(ours) + "/responses", {"input": "hi"}).status_code == 200
    assert short.post(claude.removeprefix(ours) + "/v1/messages?beta=true", {"messages": HI}).status_code == 200


EXAMPLES = [example for cells in rows_below("### Everything else") for example in re.findall(r"`(\{.*?\})`", cells[0])]


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_of_what_else_is_refused_is_refused(embedded: Serving, example: str) -> None:
    """By the embedded model, whose template has neither tools nor options."""
    body = json.loads(example)
    is_plain = "prompt" in body
    path = "/v1/completions" if is_plain else "/v1/chat/completions"
    whole = {"max_tokens": 1} if is_plain else {"messages": HI, "max_tokens": 1}
    assert embedded.post(path, whole | ({"prompt": "hi"} if is_plain else {})).status_code == 200
    answer = embedded.http.post(path, content=json.dumps(whole | body))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_the_examples_were_found() -> None:
    assert len(EXAMPLES) == 14


REAL = {
    "mirostat": 2, "typical_p": 0.7, "best_of": 3.0, "top_n_sigma": 1.0,
    "adaptive_target": 0.5, "min_keep": 2, "samplers": ["top_k"], "n_indent": 1, "prompt_logprobs": 0,
    "add_generation_prompt": False, "reasoning_budget": 0, "reasoning_format": "none",
    "skip_special_tokens": False, "verbosity": "low", "modalities": ["text", "audio"], "length_penalty": 0.5,
    "xtc_probability": 0.1, "t_max_predict_ms": 500, "echo": True, "tools": [{}], "function_call": {"name": "f"},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_values_that_ask_for_something_are_refused(short: Serving, name: str) -> None:
    answer = short.post(*body_with("OpenAI", name, REAL[name]))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "unsupported_parameter"


def number_ranges() -> Iterator[tuple[str, list[float]]]:
    for names, values, _ in rows_below("## Parameters"):
        if re.match(r"-?\d+ (to|or more)|above", values):
            ends = [float(end) for end in re.findall(r"-?\d+", values.split(";")[0])]
            for name in re.findall(r"`(\w+)`", names):
                yield name, ends


@pytest.mark.parametrize(("name", "ends"), list(number_ranges()))
def test_numbers_are_taken_to_the_ends_that_the_page_gives(short: Serving, name: str, ends: list[float]) -> None:
    def status(value: float) -> int:
        if name == "num_predict":
            return short.post(*body_with("Ollama", name, value, option=True)).status_code
        if name == "logit_bias":
            return short.post("/v1/completions", {"prompt": "hi", name: {"5": value}}).status_code
        body: dict[str, Any] = {"messages": HI, name: value}
        if name == "logprobs":
            return short.post("/v1/completions", {"prompt": "hi", name: value}).status_code
        return short.post("/v1/chat/completions", body | {"logprobs": True} | {name: value}).status_code

    low_is_open = name in ("repetition_penalty", "repeat_penalty")
    assert status(ends[0]) == (400 if low_is_open else 200)
    assert status(ends[0] - 1) == 400
    if len(ends) > 1:
        assert status(ends[1]) == 200
        assert status(ends[1] + 1) == 400


def test_the_ranges_were_found() -> None:
    found = {name for name, _ in number_ranges()}
    assert found >= {"max_tokens", "num_predict", "temperature", "top_p", "top_k", "repeat_penalty", "top_logprobs"}
