"""The Responses interface by OpenAI's own Python client: the embedded model, and a scripted one where text matters."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from hybrimoe_kt.engine.engine import Engine

from .drawn import DrawingEngine
from .scripted import ScriptedEngine
from .serving import Serving, eventually, serving
from .test_openai import CALLS, HELLO, WEATHER, client
from .test_refusals import shape

RESPONSES = "/v1/responses"
TOOL: Any = {"type": "function", **WEATHER["function"]}
THINKS = "<think>hm\nno</think>\n\n" + CALLS
LOGPROBS: Any = ["message.output_text.logprobs", "reasoning.encrypted_content"]


class Asked:
    """A server that answers with `self.says`, and a client for it."""

    def __init__(self, running: Serving, engine: ScriptedEngine, made: OpenAI) -> None:
        self.running, self.engine, self.made = running, engine, made
        self.says = ""

    def create(self, **more: Any) -> Any:
        return self.made.responses.create(**{"model": "scripted", "input": "hi"} | more)

    def prompt(self, **more: Any) -> str:
        """What the model reads."""
        self.create(**more)
        return self.engine.prompts[-1]


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
    given: Any = {"model": "small-talk", "input": HELLO, "max_output_tokens": 10, "temperature": 0}
    with client(embedded) as made:
        whole = made.responses.create(**given)
        events = list(made.responses.create(**given, stream=True))
        counted = made.responses.input_tokens.count(model="small-talk", input=HELLO)
    engine.reset()
    plain = embedded.ask(HELLO[0]["content"], max_tokens=10).json()["choices"][0]["message"]["content"]
    streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert whole.output_text == streamed == events[-1].response.output_text == plain
    assert events[-1].type == "response.incomplete"
    for response in (whole, events[-1].response):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.output[-1].status == "incomplete"
        assert response.usage.input_tokens == len(engine.vocabulary.chat_ids(HELLO)) == counted.input_tokens
        assert response.usage.output_tokens == 10
    assert events[-1].response.usage.input_tokens_details.cached_tokens > 0


ITEMS = {
    "reasoning": ("reasoning_text", "text"),
    "message": ("output_text", "text"),
    "function_call": ("function_call_arguments", "arguments"),
}
"""Type of an item -> what its deltas are called, and what holds the whole of them."""


def test_events_come_in_order_and_make_up_the_response(asked: Asked) -> None:
    asked.says = THINKS
    events = list(asked.create(tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert all(event.response.status == "in_progress" and event.response.output == [] for event in events[:2])
    last = events[-1]
    assert last.type == "response.completed" and last.response.status == "completed"
    assert len({event.response.id for event in (*events[:2], last)}) == 1
    assert [item.type for item in last.response.output] == ["reasoning", "message", "function_call", "function_call"]
    rest = events[2:-1]
    for index, item in enumerate(last.response.output):
        own = [event for event in rest if event.output_index == index]
        assert own == rest[: len(own)]  # one item after the other
        rest = rest[len(own) :]
        name, holds = ITEMS[item.type]
        is_call = item.type == "function_call"
        deltas = [event for event in own if event.type == f"response.{name}.delta"]
        frame = ["output_item.added", *([] if is_call else ["content_part.added"]), *[f"{name}.delta"] * len(deltas),
                 f"{name}.done", *([] if is_call else ["content_part.done"]), "output_item.done"]  # fmt: skip
        assert [event.type for event in own] == [f"response.{one}" for one in frame]
        assert own[0].item.status == "in_progress" and own[0].item.id == item.id
        assert {event.item_id for event in own[1:-1]} == {item.id}
        assert own[-1].item == item
        done = own[1 + len(deltas)] if is_call else own[2 + len(deltas)]
        text = item.arguments if is_call else item.content[0].text
        assert "".join(event.delta for event in deltas) == getattr(done, holds) == text != ""
        if not is_call:
            assert own[-2].part.model_dump() == item.content[0].model_dump()
            assert own[1].part.text == "" and own[0].item.content == []
    assert rest == []
    reasoning, message, *calls = last.response.output
    assert (reasoning.content[0].text, message.content[0].text.strip()) == ("hm\nno", "Let me see.")
    assert [json.loads(call.arguments) for call in calls] == [{"place": "Zürich", "days": 2}, {"place": "Bern"}]
    assert len({call.call_id for call in calls}) == 2
    usage = last.response.usage
    assert usage.output_tokens_details.reasoning_tokens == len("hm\nno")
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_the_clients_own_stream_and_the_whole_response_say_the_same(asked: Asked) -> None:
    asked.says = THINKS
    with asked.made.responses.stream(model="scripted", input="hi", tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    whole = asked.create(tools=[TOOL])
    assert "response.function_call_arguments.delta" in kinds
    drop: Any = {"id": True, "created_at": True, "completed_at": True, "output": {"__all__": {"id", "call_id"}}}
    shown = final.model_dump(exclude=drop, exclude_none=True)
    for item in shown["output"]:
        item.pop("parsed_arguments", None)
    assert shown == whole.model_dump(exclude=drop, exclude_none=True)
    assert (whole.store, whole.model, whole.tool_choice, whole.truncation) == (False, "scripted", "auto", "disabled")
    assert whole.tools[0].name == "weather"


def test_a_function_is_called_and_its_result_goes_back(asked: Asked) -> None:
    asked.says = THINKS
    first = asked.create(tools=[TOOL], instructions="Be brief.", include=LOGPROBS[1:], store=True)
    calls = [item for item in first.output if item.type == "function_call"]
    outputs = [
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": calls[1].call_id,
            "output": [{"type": "input_text", "text": "wet"}],
        },
    ]
    asked.says = "Sunny."
    items = [{"role": "user", "content": "hi"}, *first.output, *outputs]
    second = asked.create(tools=[TOOL], instructions="Be brief.", input=items)
    assert second.output_text == "Sunny."
    prompt = asked.engine.prompts[-1]
    asked.running.post(
        "/v1/chat/completions",
        {
            "tools": [WEATHER],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm\nno", "tool_calls": [
                    {"id": call.call_id, "function": {"name": call.name, "arguments": call.arguments}}
                    for call in calls
                ]},
                {"role": "tool", "tool_call_id": calls[0].call_id, "content": "sunny"},
                {"role": "tool", "tool_call_id": calls[1].call_id, "content": "wet"},
            ],
        },
    )  # fmt: skip
    assert asked.engine.prompts[-1] == prompt
    assert '<tool_call>{"name": "weather", "arguments": {"place": "Bern"}}</tool_call>' in prompt


def test_functions_of_a_namespace_are_called_by_both_names(asked: Asked) -> None:
    """Codex has those of each MCP server in one, and calls none that comes without it."""
    asked.says = CALLS.replace('"weather"', '"mcp__sky__weather"')
    spaced = {"type": "namespace", "name": "mcp__sky", "description": "The sky.", "tools": [TOOL]}
    searches = [{"type": "web_search"}, {"type": "web_search", "external_web_access": False}]
    first = asked.create(tools=[spaced, *searches], input="Look.")
    assert "web_search" not in asked.engine.prompts[-1]
    assert '"name": "mcp__sky__weather"' in asked.engine.prompts[-1]
    call = first.output[1]
    assert (call.namespace, call.name, json.loads(call.arguments)["days"]) == ("mcp__sky", "weather", 2)
    prompt = asked.prompt(tools=[spaced], input=[{"role": "user", "content": "Look."}, *first.output])
    assert '<tool_call>{"name": "mcp__sky__weather", "arguments": {"place": "Bern"}}</tool_call>' in prompt


def test_thoughts_go_back_to_templates_that_read_them() -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.reasoning_content }}; {{ m.content }}\n{% endfor %}"
    engine = ScriptedEngine(lambda prompt: "yes", chat_template=template)
    with serving(engine) as running, client(running) as made:
        text = {"type": "reasoning_text", "text": "hm"}
        thoughts = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [text], "encrypted_content": None}
        said = {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "no", "annotations": []}],
        }
        made.responses.create(model="scripted", input=[{"role": "user", "content": "a"}, thoughts, said])  # type: ignore[list-item]
    assert engine.prompts[-1].endswith("[assistant] hm; no\n")


def test_messages_of_one_role_are_one(asked: Asked) -> None:
    def says(role: str, *texts: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text} for text in texts]}

    prompt = asked.prompt(
        instructions="Be brief.", input=[says("developer", "And kind."), says("user", "a", "b"), says("user", "c")]
    )
    assert prompt.startswith("<|im_start|>system\nBe brief.\nAnd kind.<|im_end|>\n<|im_start|>user\na\nb\nc<|im_end|>")
    assert prompt == asked.prompt(
        input=[says("system", "Be brief.", "And kind."), says("user", "a"), says("user", "b", "c")]
    )
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}
    later = asked.prompt(input=[says("user", "a"), refusal, says("developer", "Be quick."), says("user", "b")])
    assert "assistant\nI will not.<|im_end|>\n<|im_start|>user\nBe quick.\nb<|im_end|>" in later


def test_sampling_and_choices_reach_the_engine(asked: Asked) -> None:
    extra = {"min_p": 0.1, "seed": 7, "stop": ["nowhere"]}
    given = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 99.0}
    kept = {"store": True, "metadata": {"a": "b"}, "prompt_cache_key": "k", "truncation": "disabled", "user": "me"}
    response = asked.create(**given, **kept, extra_body=extra, text={"format": {"type": "text"}, "verbosity": "medium"})
    sampling = asked.engine.samplings[-1]
    wanted = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "seed": 7, "max_new_tokens": 99}
    assert {name: getattr(sampling, name) for name in wanted} == wanted
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 99)
    assert (response.metadata, response.prompt_cache_key, response.user) == ({"a": "b"}, "k", "me")
    asked.says = CALLS
    one = asked.create(tools=[TOOL], parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["message", "function_call"]
    assert asked.create(tools=[TOOL], tool_choice="none").output_text == CALLS
    assert asked.prompt(reasoning={"effort": "none", "summary": "auto"}).endswith("</think>\n\n")


NULLS = (
    "model", "instructions", "stream", "max_output_tokens", "temperature", "top_p", "include", "top_logprobs", "tools",
    "tool_choice", "parallel_tool_calls", "reasoning", "text", "store", "metadata", "background", "truncation",
    "previous_response_id", "conversation", "prompt", "user", "service_tier", "n", "seed", "stop",
)  # fmt: skip


def test_null_is_left_out(asked: Asked) -> None:
    asked.create()
    plain = asked.engine.prompts[-1], asked.engine.samplings[-1]
    message = {"type": "message", "role": "user", "content": "hi", "id": None, "status": None}
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "x"}
    inner = {"reasoning": {"effort": None, "summary": None}, "text": {"format": None, "verbosity": None}}
    for body in ({"input": "hi", **dict.fromkeys(NULLS)}, {"input": [message, sealed], **inner}):
        answer = asked.running.post(RESPONSES, body)
        assert answer.json()["output"][0]["content"][0]["text"] == "Fine.", answer.text
        assert (asked.engine.prompts[-1], asked.engine.samplings[-1]) == plain


def test_white_space_around_calls_is_no_message(asked: Asked) -> None:
    call = CALLS.split("see.")[1]
    for says, kinds in (
        (call + "\n", ["function_call", "function_call"]),
        (f"  {call}\n done ", ["function_call", "function_call", "message"]),
        ("\n ", []),
    ):
        asked.says = says
        response = asked.create(tools=[TOOL])
        assert [item.type for item in response.output] == kinds
        streamed = list(asked.create(tools=[TOOL], stream=True))[-1].response
        assert streamed.output_text == response.output_text
        assert response.output_text.strip() == ("done" if "message" in kinds else "")


def test_logprobs_tell_of_the_texts_tokens(asked: Asked) -> None:
    asked.says = "<think>hm</think>Well, no."
    part = asked.create(include=LOGPROBS, top_logprobs=2).output[-1].content[0]
    assert part.text == "Well, no."
    assert "".join(one.token for one in part.logprobs).endswith("Well, no.")
    assert {len(one.top_logprobs) for one in part.logprobs} == {2}
    events = list(asked.create(include=LOGPROBS, stream=True))
    streamed = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert (
        [one.token for one in streamed] == [one.token for one in part.logprobs] == [one.token for one in done.logprobs]
    )
    assert asked.create().output[-1].content[0].logprobs == []


CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}
REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "nothing to answer": ({"input": []}, "input: List should have at least 1 item", "input"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text", "input[0].content[0]"
    ),
    "an item kept": ({"input": [{"type": "item_reference", "id": "m"}]}, "this server keeps none", "input[0]"),
    "arguments that are no JSON": ({"input": [CALL]}, "the arguments of 'f' are not JSON", "input"),
    "an earlier response": ({"previous_response_id": "r"}, "keeps no responses; send", "previous_response_id"),
    "a conversation": ({"conversation": {"id": "c"}}, "keeps no responses; send the whole", "conversation"),
    "in the background": ({"background": True}, "an answer is given while one waits", "background"),
    "a kept prompt": ({"prompt": {"id": "p"}}, "this server keeps no prompts", "prompt"),
    "cutting": ({"truncation": "auto"}, "refused rather than cut", "truncation"),
    "no schema": ({"text": {"format": {"type": "json_schema"}}}, "needs json_schema.schema", "text.format"),
    "a chat's other format": ({"response_format": {"type": "xml"}}, "not 'xml'", "text.format"),
    "few words": ({"text": {"verbosity": "low"}}, "text.verbosity is not supported", "text.verbosity"),
    "an effort": ({"reasoning": {"effort": "high"}}, "reasoning.effort 'high' is not supported", "reasoning.effort"),
    "two answers": ({"n": 2}, "n is not supported", "n"),
    "a call of no tools": ({"tool_choice": "required"}, "there are no tools to choose from", "tool_choice"),
    "a search": (
        {"tools": [TOOL, {"type": "file_search"}]}, "'file_search' are not supported: this server", "tools[1]",
    ),
    "nothing but a search": (
        {"tools": [{"type": "web_search"}], "tool_choice": "required"}, "there are no tools", "tool_choice",
    ),
    "a forced search": (
        {"tools": [TOOL, {"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice", "tool_choice",
    ),
    "a search within": (
        {"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "custom", "name": "b"}]}]},
        "'custom' are not supported: what a tool is given is JSON here", "tools[0].tools[0]",
    ),
    "one name twice": ({"tools": [TOOL, TOOL]}, "two tools are called 'weather'", "tools[1]"),
    "an unknown tool": ({"tools": [{"type": "magic"}]}, "'magic' are not supported: only functions are", "tools[0]"),
    "a tool without a name": ({"tools": [{"type": "function"}]}, "tools[0].name: Field required", "tools[0].name"),
    "logprobs of nothing": ({"top_logprobs": 2}, "in include", "top_logprobs"),
    "too long": ({"input": "x" * 5000}, "the context holds 4096", "input"),
    "half a character": ({"input": "\ud83d"}, "half of a surrogate pair", None),
    "a length": ({"max_output_tokens": 1.5}, "max_output_tokens: Input should be a valid integer", "max_output_tokens"),
    "metadata that are no texts": ({"metadata": {"a": 1}}, "metadata.a: Input should be a valid string", "metadata.a"),
    "no number": ({"tools": [TOOL | {"parameters": {"a": float("nan")}}]}, "NaN and Infinity are no JSON", None),
    "a seed": ({"seed": "x"}, "seed: Input should be a valid integer", "seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_in_a_sentence(asked: Asked, case: str) -> None:
    body, reason, param = REFUSED[case]
    for stream in (False, True):
        answer = asked.running.http.post(RESPONSES, content=json.dumps({"input": "hi", "stream": stream} | body))
        error = shape(answer)
        assert (answer.status_code, error["param"]) == (400, param)
        assert reason in error["message"]


def test_what_is_nested_too_deeply_to_be_told_again_is_refused(asked: Asked) -> None:
    statuses = []
    for depth in (20, *range(700, 1100, 25)):
        nested = '{"a":' * depth + "1" + "}" * depth
        tools = [{"type": "function", "name": "f", "parameters": "NESTED"}]
        for body in ({"input": "hi", "other": "NESTED"}, {"input": "hi", "tools": tools}):
            answer = asked.running.http.post(RESPONSES, content=json.dumps(body).replace('"NESTED"', nested))
            statuses.append(answer.status_code)
    assert set(statuses[:2]) == {200} and set(statuses[2:]) <= {200, 400}


def test_calls_are_forced_and_texts_held_to_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    tool: Any = {"type": "function", "name": "f", "parameters": schema}
    with serving(DrawingEngine()) as running, client(running) as made:
        given: Any = {"model": "scripted", "max_output_tokens": 400, "input": "hi"}
        listed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
        for choice, tools in (("required", [tool]), ({"type": "function", "name": "f"}, [tool, TOOL]),
                              (listed, [tool, TOOL])):  # fmt: skip
            response = made.responses.create(**given, tools=tools, tool_choice=choice, parallel_tool_calls=False)
            calls = [item for item in response.output if item.type == "function_call"]
            assert [(call.name, json.loads(call.arguments)["a"] in (1, 2)) for call in calls] == [("f", True)]
        form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
        response = made.responses.create(**given, text={"format": form})
        assert json.loads(response.output_text)["a"] in (1, 2)
        assert response.text.format.type == "json_schema"


def test_nothing_is_kept(asked: Asked) -> None:
    response = asked.create(store=True)
    for ask in (asked.made.responses.retrieve, asked.made.responses.delete, asked.made.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="keeps no responses"):
            ask(response.id)
    with pytest.raises(openai.NotFoundError, match="the one served is 'scripted'"):
        asked.create(model="gpt-5")


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event() -> None:
    def fail(number: int, stop: object) -> None:
        if number == 4:
            raise RuntimeError("a secret path /home/x")

    with serving(ScriptedEngine(before_token=fail)) as running, client(running) as made:
        events = list(made.responses.create(model="scripted", input="hi", stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "echo"
        failed = events[-1]
        assert (failed.type, failed.response.status) == ("response.failed", "failed")
        assert failed.response.error.code == "server_error"
        assert "inside the server" in failed.response.error.message
        with pytest.raises(openai.InternalServerError, match="inside the server"):
            made.responses.create(model="scripted", input="hi")


def test_a_stream_that_is_closed_ends_the_answer() -> None:
    stopped = threading.Event()

    def hold(number: int, stop: threading.Event) -> None:
        if number == 2 and stop.wait(20):
            stopped.set()

    with serving(ScriptedEngine(before_token=hold)) as running, client(running) as made:
        with made.responses.create(model="scripted", input="hi", stream=True) as stream:
            assert next(event for event in stream if event.type == "response.output_text.delta").delta == "e"
        assert eventually(stopped.is_set)
