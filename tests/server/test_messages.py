"""Anthropic's own Python client against the server: the embedded model, and a scripted one where the text matters."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from hybrimoe_kt.engine.engine import Engine

from .drawn import DrawingEngine
from .scripted import ScriptedEngine
from .serving import Serving, eventually, serving
from .test_openai import CALLS

HELLO: list[Any] = [{"role": "user", "content": "Hello! How are you today?"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
    "cache_control": {"type": "ephemeral"},
}
MESSAGES = "/v1/messages"


def client(running: Serving, **how: Any) -> Anthropic:
    return Anthropic(base_url=running.url, **{"api_key": "none", "max_retries": 0, "timeout": 60} | how)


class Asked:
    """A server that answers with `self.says`, and a client for it."""

    def __init__(self, running: Serving, engine: ScriptedEngine, made: Anthropic) -> None:
        self.running, self.engine, self.made = running, engine, made
        self.says = ""

    def create(self, **more: Any) -> Any:
        return self.made.messages.create(**{"model": "scripted", "max_tokens": 999, "messages": HELLO} | more)

    def prompt(self, **more: Any) -> str:
        """What the model reads."""
        self.create(**more)
        return self.engine.prompts[-1]

    def refusal(self, body: dict[str, Any], path: str = MESSAGES) -> str:
        """Why a request is refused, after checking the error's shape."""
        answer = self.running.http.post(
            path, content=json.dumps({"max_tokens": 9, "messages": HELLO, **body}), headers={"x-api-key": "none"}
        )
        assert answer.status_code == 400, answer.text
        error = answer.json()
        assert error.keys() == {"type", "error"} and error["type"] == "error"
        assert error["error"].keys() == {"type", "message"} and error["error"]["type"] == "invalid_request_error"
        return str(error["error"]["message"])


@pytest.fixture(scope="module")
def module_asked() -> Iterator[Asked]:
    engine = ScriptedEngine()
    with serving(engine) as running, client(running) as made:
        yield Asked(running, engine, made)


@pytest.fixture
def asked(module_asked: Asked) -> Asked:
    module_asked.engine.script = lambda prompt: module_asked.says
    module_asked.says = "Fine."
    return module_asked


def test_the_embedded_model_whole_and_streamed(embedded: Serving, engine: Engine) -> None:
    given: Any = {"model": "small-talk", "max_tokens": 10, "messages": HELLO}
    with client(embedded) as made:
        whole = made.messages.create(**given)
        with made.messages.stream(**given) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        again = made.messages.create(**given)
    engine.reset()
    plain = embedded.ask(HELLO[0]["content"], max_tokens=10).json()["choices"][0]["message"]["content"]
    assert [block.text for block in whole.content] == [block.text for block in final.content] == [text] == [plain]
    assert (whole.stop_reason, final.stop_reason) == ("max_tokens", "max_tokens")
    num_tokens = len(engine.vocabulary.chat_ids(HELLO))
    for message in (whole, final, again):
        read = message.usage.input_tokens + message.usage.cache_read_input_tokens
        assert (read, message.usage.output_tokens) == (num_tokens, 10)
    assert again.usage.cache_read_input_tokens > 0


THINKS = "<think>hm\nno</think>\n\n" + CALLS


def test_events_come_in_order_and_make_up_the_message(asked: Asked) -> None:
    asked.says = THINKS
    whole = asked.create(tools=[WEATHER])
    events = list(asked.create(tools=[WEATHER], stream=True))
    others = [event for event in events if not event.type.startswith("content_block")]
    assert [event.type for event in others] == ["message_start", "message_delta", "message_stop"]
    assert (events[0], events[-1]) == (others[0], others[-1])
    content: list[dict[str, Any]] = []
    is_open = False
    for event in events[1:-2]:
        assert (event.type == "content_block_start") != is_open
        if event.type == "content_block_start":
            content.append({"block": event.content_block.model_dump(), "deltas": []})
            is_open = True
        assert event.index == len(content) - 1
        if event.type == "content_block_delta":
            content[-1]["deltas"].append(event.delta)
        is_open = event.type != "content_block_stop"
    assert [one["block"]["type"] for one in content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, *calls = (one["deltas"] for one in content)
    assert "".join(delta.thinking for delta in thinking[:-1]) == "hm\nno" == whole.content[0].thinking
    assert thinking[-1].type == "signature_delta" and thinking[-1].signature == whole.content[0].signature != ""
    assert "".join(delta.text for delta in text) == whole.content[1].text
    assert whole.content[1].text.strip() == "Let me see."
    written = [json.loads("".join(delta.partial_json for delta in deltas)) for deltas in calls]
    assert (
        written == [block.input for block in whole.content[2:]] == [{"place": "Zürich", "days": 2}, {"place": "Bern"}]
    )
    assert len({block.id for block in whole.content[2:]}) == 2
    assert events[-2].delta.stop_reason == whole.stop_reason == "tool_use"
    for name, value in whole.usage.model_dump(exclude_none=True).items():
        assert getattr(events[-2].usage, name) == value
    assert others[0].message.usage.input_tokens == whole.usage.input_tokens


def test_the_clients_own_stream_ends_with_the_message(asked: Asked) -> None:
    asked.says = THINKS
    given: Any = {"model": "scripted", "max_tokens": 999, "messages": HELLO, "tools": [WEATHER]}
    with asked.made.messages.stream(**given) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    whole = asked.create(tools=[WEATHER])
    assert kinds >= {"text", "thinking", "input_json", "signature", "message_stop"}
    for ours, theirs in zip(whole.content, final.content, strict=True):
        wanted = ours.model_dump(exclude={"id"})
        assert theirs.model_dump(exclude={"id", "parsed_output"}) == wanted
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)


def test_a_tool_is_called_and_its_result_goes_back(asked: Asked) -> None:
    asked.says = THINKS
    first = asked.create(tools=[WEATHER], system="Be brief.")
    assert "The weather of a place." in asked.engine.prompts[-1]
    calls = [block for block in first.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": [{"type": "text", "text": "sunny"}]},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": "no such place", "is_error": True},
    ]
    asked.says = "Sunny."
    turns = [*HELLO, {"role": "assistant", "content": first.content},
             {"role": "user", "content": [{"type": "text", "text": "And?"}, *results]}]  # fmt: skip
    assert asked.create(tools=[WEATHER], system="Be brief.", messages=turns).content[0].text == "Sunny."
    prompt = asked.engine.prompts[-1]
    asked.running.post(
        "/v1/chat/completions",
        {
            "tools": [{"type": "function", "function": {
                "name": "weather", "description": WEATHER["description"], "parameters": WEATHER["input_schema"]}}],
            "messages": [
                {"role": "system", "content": "Be brief."},
                *HELLO,
                {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm\nno", "tool_calls": [
                    {"id": call.id, "function": {"name": call.name, "arguments": json.dumps(call.input)}}
                    for call in calls
                ]},
                {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
                {"role": "tool", "tool_call_id": calls[1].id, "content": "Error: no such place"},
                {"role": "user", "content": "And?"},
            ],
        },
    )  # fmt: skip
    assert asked.engine.prompts[-1] == prompt
    assert '<tool_call>{"name": "weather", "arguments": {"place": "Bern"}}</tool_call>' in prompt


def test_results_of_all_kinds_are_text(asked: Asked) -> None:
    def result(**how: Any) -> str:
        call = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, CALL]}
        block = {"type": "tool_result", "tool_use_id": "a", **how}
        prompt = asked.prompt(messages=[*HELLO, call, {"role": "user", "content": [block]}])
        return prompt.split("<|im_start|>tool\n")[1].split("<|im_end|>")[0]

    assert result() == result(content=[]) == result(content="") == ""
    assert result(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "a\nb"
    assert result(content=[{"type": "tool_reference", "tool_name": "weather"}]) == "weather"
    assert result(content="no", is_error=True) == "Error: no"


def test_what_the_system_says_stands_where_it_changes_no_beginning(asked: Asked) -> None:
    header = "x-anthropic-billing-header: cc_version=2.1.1; cc_entrypoint=cli; cch=0a1b2;"
    system = [{"type": "text", "text": header}, {"type": "text", "text": "You are brief."}]
    note = {"role": "system", "content": "It is late."}
    reply = {"role": "assistant", "content": "Fine."}
    prompt = asked.prompt(system=system, messages=[*HELLO, note])
    assert prompt.startswith("<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\n")
    assert "How are you today?\nIt is late.<|im_end|>" in prompt
    longer = asked.prompt(system=system, messages=[*HELLO, note, reply, note, *HELLO])
    assert longer.startswith(prompt) and longer.count("<|im_start|>user") == 2
    assert asked.prompt(system=header + "You are brief.", messages=[*HELLO, note]) == prompt
    assert asked.prompt(messages=[note, *HELLO]).startswith("<|im_start|>system\nIt is late.<|im_end|>")
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
    assert "tool\nIt is late.<|im_end|>" in asked.prompt(messages=[*HELLO, called, result, note])


def test_thoughts_are_turned_on_and_off_where_the_template_can() -> None:
    engine = ScriptedEngine(lambda prompt: "yes")
    with serving(engine) as running, client(running) as made:

        def prompt(**more: Any) -> str:
            made.messages.create(model="scripted", max_tokens=9, messages=HELLO, **more)
            return engine.prompts[-1]

        plain = prompt()
        assert not plain.endswith("</think>\n\n")
        assert prompt(thinking={"type": "disabled"}).endswith("</think>\n\n")
        assert prompt(thinking={"type": "enabled", "budget_tokens": 1024}) == plain
        assert prompt(thinking={"type": "adaptive"}, output_config={"effort": "max"}) == plain


SHOWS = "{{ messages[0].content }} {{ reasoning_effort }}"
EFFORTS: dict[str, tuple[str, dict[str, str]]] = {
    "any": (SHOWS, {"low": "low", "medium": "medium", "xhigh": "high", "max": "high", "none": "none", "vast": ""}),
    "some": (
        "{% if reasoning_effort and reasoning_effort not in ['none', 'high'] %}{{ raise_exception('no') }}{% endif %}"
        + SHOWS,
        {"low": "high", "medium": "high", "max": "high", "none": "none"},
    ),
    "others": (
        "{% if reasoning_effort and reasoning_effort not in ['low', 'max'] %}{{ raise_exception('no') }}{% endif %}"
        + SHOWS,
        {"low": "low", "xhigh": "max", "none": ""},
    ),
    "no": ("{{ messages[0].content }} ", {"high": "", "none": ""}),
}


@pytest.mark.parametrize("case", EFFORTS)
def test_an_effort_is_the_nearest_that_the_template_takes(case: str) -> None:
    """None: thinking is disabled."""
    template, wanted = EFFORTS[case]
    engine = ScriptedEngine(lambda prompt: "yes", chat_template=template)
    with serving(engine) as running:
        for effort, shown in wanted.items():
            how = {"output_config": {"effort": effort}} if effort != "none" else {"thinking": {"type": "disabled"}}
            answer = running.post(MESSAGES, {"max_tokens": 9, "messages": HELLO, **how})
            assert answer.status_code == 200, answer.text
            assert engine.prompts[-1] == f"{HELLO[0]['content']} {shown}", effort


@pytest.mark.parametrize(
    ("more", "text", "reason", "stop"),
    [
        ({"stop_sequences": ["three", " two"]}, "one", "stop_sequence", " two"),
        ({"stop_sequences": ["nowhere", ""]}, "one two three", "end_turn", None),
        ({"max_tokens": 5}, "one t", "max_tokens", None),
        ({"max_tokens": 0}, "", "max_tokens", None),
    ],
)
def test_how_an_answer_ends(asked: Asked, more: dict[str, Any], text: str, reason: str, stop: str | None) -> None:
    asked.says = "one two three"
    whole = asked.create(**more)
    final = list(asked.create(**more, stream=True))[-2].delta
    assert "".join(block.text for block in whole.content) == text
    assert (whole.stop_reason, whole.stop_sequence) == (final.stop_reason, final.stop_sequence) == (reason, stop)


def test_an_answer_that_the_context_ends_says_so(asked: Asked) -> None:
    asked.says = "x" * 5000
    assert asked.create(max_tokens=5000).stop_reason == "model_context_window_exceeded"


def test_sampling_and_choices_reach_the_engine(asked: Asked) -> None:
    extra = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 7,
        "metadata": {"user_id": "me"},
        "context_management": {"edits": []},
    }
    beta = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}
    asked.create(extra_body=extra, extra_headers=beta)
    sampling = asked.engine.samplings[-1]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 7, "max_new_tokens": 999}
    assert {name: getattr(sampling, name) for name in wanted} == wanted
    asked.says = CALLS
    one = asked.create(tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["text", "tool_use"]
    none = asked.create(tools=[WEATHER], tool_choice={"type": "none"})
    assert [block.text for block in none.content] == [CALLS]


NULLS = (
    "model", "system", "stream", "max_tokens", "stop_sequences", "temperature", "top_p", "top_k", "tools", "thinking",
    "tool_choice", "output_config", "output_format", "metadata", "container", "mcp_servers", "n", "seed",
)  # fmt: skip


def test_null_is_left_out(asked: Asked) -> None:
    asked.create(max_tokens=4096)
    plain = asked.engine.prompts[-1], asked.engine.samplings[-1]
    for nulls in (dict.fromkeys(NULLS), {"thinking": {"type": "adaptive", "budget_tokens": None}, "output_config": {}}):
        answer = asked.running.post(MESSAGES, {"messages": HELLO, **nulls})
        assert answer.json()["content"] == [{"type": "text", "text": "Fine."}]
        assert (asked.engine.prompts[-1], asked.engine.samplings[-1]) == plain


def test_tokens_are_counted_as_they_are_read(asked: Asked) -> None:
    given: dict[str, Any] = {"system": "Be brief.", "tools": [WEATHER], "thinking": {"type": "disabled"}}
    counted = asked.made.messages.count_tokens(model="scripted", messages=HELLO, **given).input_tokens
    assert counted == asked.create(**given).usage.input_tokens > 100


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages: List should have at least 1 item"),
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]: only text goes into"),
    "an image of a tool": (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
        "messages[0].content[0].content[0]: only text goes into",
    ),
    "a document": ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "no documents"),
    "a block of no type": ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]: only text"),
    "a user's call": ({"messages": [{"role": "user", "content": [CALL]}]}, "'tool_use' belong to the other role"),
    "an answer begun": ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "an answer cannot be begun"),
    "no schema": ({"output_config": {"format": {"type": "json_schema"}}}, "needs json_schema.schema"),
    "another format": ({"output_format": {"type": "xml"}}, "not 'xml'"),
    "two answers": ({"n": 2}, "n is not supported: an answer has one choice"),
    "a server's tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools of type 'web_search_20250305' are not supported: this server searches nothing",
    ),
    "an unknown tool": ({"tools": [{"type": "magic_20300101", "name": "m"}]}, "only tools with an input_schema are"),
    "a tool without a name": ({"tools": [{"input_schema": {}}]}, "tools[0].name: Field required"),
    "any tool of none": ({"tool_choice": {"type": "any"}}, "there are no tools to choose from"),
    "a tool that is none": (
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}},
        "'f' is none of the tools",
    ),
    "a temperature": ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt is too long: 50"),
    "half a character": ({"system": "\ud83d"}, "half of a surrogate pair"),
    "a seed": ({"seed": "x"}, "seed: Input should be a valid integer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_in_a_sentence(asked: Asked, case: str) -> None:
    body, reason = REFUSED[case]
    assert reason in asked.refusal(body)
    if case != "a temperature":
        assert reason in asked.refusal(body | {"stream": True})


def test_calls_are_forced_and_texts_held_to_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    with serving(DrawingEngine()) as running, client(running) as made:
        given: Any = {"model": "scripted", "max_tokens": 400, "messages": HELLO}
        tool: Any = {"name": "f", "input_schema": schema}
        for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "f"}):
            message = made.messages.create(**given, tools=[tool, WEATHER][: 1 + (choice["type"] == "tool")],
                                           tool_choice=choice)  # fmt: skip
            calls = [block for block in message.content if block.type == "tool_use"]
            assert [(call.name, call.input["a"] in (1, 2)) for call in calls] == [("f", True)]
            assert message.stop_reason == "tool_use"
        form = {"type": "json_schema", "schema": schema}
        for how in ({"output_config": {"format": form}}, {"output_format": form}):
            message = made.messages.create(**given, extra_body=how)
            assert json.loads(message.content[-1].text)["a"] in (1, 2)


def test_errors_have_anthropics_shape(asked: Asked) -> None:
    with pytest.raises(anthropic.NotFoundError, match="the one served is 'scripted'") as absent:
        asked.create(model="claude-of-old")
    assert absent.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    for path, status in ((f"{MESSAGES}/batches", 404), (f"{MESSAGES}/msg_1", 404)):
        answer = asked.running.post(path, {})
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "not_found_error"
    assert asked.running.http.get(MESSAGES).json()["error"]["type"] == "invalid_request_error"
    assert "not JSON" in asked.running.http.post(MESSAGES, content=b"{").json()["error"]["message"]


def test_either_header_carries_the_key() -> None:
    with serving(ScriptedEngine(), api_key="secret") as running:
        for how in ({"api_key": "secret"}, {"api_key": None, "auth_token": "secret"}):
            with client(running, **how) as made:
                assert made.messages.count_tokens(model="scripted", messages=HELLO).input_tokens > 0
        for how in ({"api_key": "wrong"}, {"api_key": None, "auth_token": "wrong"}):
            with client(running, **how) as made, pytest.raises(anthropic.AuthenticationError, match="x-api-key"):
                made.messages.create(model="scripted", max_tokens=9, messages=HELLO)
        assert running.http.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 200
        assert running.http.get("/v1/models", headers={"x-api-key": ""}).status_code == 401


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_stream() -> None:
    def fail(number: int, stop: object) -> None:
        if number == 4:
            raise RuntimeError("a secret path /home/x")

    with serving(ScriptedEngine(before_token=fail)) as running, client(running) as made:
        given: Any = {"model": "scripted", "max_tokens": 99, "messages": HELLO}
        said: list[str] = []
        with (
            pytest.raises(anthropic.APIError, match="inside the server") as failed,
            made.messages.stream(**given) as it,
        ):
            said.extend(it.text_stream)
        assert "".join(said) == "echo"
        assert "secret" not in str(failed.value.body)
        with pytest.raises(anthropic.InternalServerError, match="inside the server"):
            made.messages.create(**given)


def test_a_stream_that_is_closed_ends_the_answer_and_a_silent_one_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrimoe_kt.server.streams.PING_S", 0.02)
    stopped = threading.Event()

    def hold(number: int, stop: threading.Event) -> None:
        if number == 2 and stop.wait(20):
            stopped.set()

    with serving(ScriptedEngine(before_token=hold)) as running:
        body = {"model": "scripted", "max_tokens": 99, "messages": HELLO, "stream": True}
        with running.http.stream("POST", MESSAGES, json=body) as answer:
            for line in answer.iter_lines():
                if line == 'data: {"type":"ping"}':
                    break
        assert eventually(stopped.is_set)
