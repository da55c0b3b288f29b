"""Chat templates get what they can read: text or parts, tools in their form, options they know; nothing gets lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hybrimoe_kt.engine.chat.call_notations import CALLS as NOTATIONS
from hybrimoe_kt.engine.chat.chat_template import chat_prompt, template_takes
from hybrimoe_kt.errors import ConfigError, ModelError
from tests.server.scripted import byte_tokenizer
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.vocabularies import byte_level

from .llama_cpp import LlamaCpp

TEXT = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
PARTS = "{% for m in messages %}[{{ m.role }}] {% for p in m.content %}{{ p.text }}{% endfor %} {% endfor %}"
TYPED = (
    "{% for m in messages %}[{{ m.role }}] {% for p in m.content %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %} {% endfor %}"
)
EITHER = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %} {% endfor %}"
)
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}" + TEXT
TEMPLATES = {"text": TEXT, "parts": PARTS, "typed parts": TYPED, "either": EITHER}
ONE_PART = [{"type": "text", "text": "Hello there"}]


def shown(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    tokenizer = byte_tokenizer(template)
    return str(tokenizer.decode(chat_prompt(tokenizer, messages, **more)))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("content", ["Hello there", ONE_PART], ids=["a text", "a list"])
def test_no_text_gets_lost_whatever_form_it_comes_in(template: str, content: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    assert shown(template, messages) == "[system] Be brief [user] Hello there [assistant] Hi [user] Bye "


@pytest.mark.parametrize("template", [PARTS, TEXT, EITHER], ids=["parts", "text", "either"])
def test_several_parts_are_joined_as_in_llama_cpp(generated: Callable[[Shape], GeneratedModel], template: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    vocabulary = replace(byte_level("qwen2"), chat_template=template)
    shape = Shape(vocabulary=vocabulary, hidden=64, inter=64, dense_inter=64, heads=2, kv_heads=1, layers=1)
    assert shown(template, messages) == LlamaCpp(generated(shape).path).rendered(messages)


def test_a_template_that_refuses_the_trial_gets_text() -> None:
    assert shown(STRICT, [{"role": "system", "content": ONE_PART}]) == "[system] Hello there "
    with pytest.raises(ModelError, match="a system message comes first"):
        shown(STRICT, [{"role": "user", "content": ONE_PART}])


def test_what_is_not_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="others are not understood"):
        shown(TEXT, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_a_tokenizer_without_a_template_gets_the_texts() -> None:
    tokenizer = byte_tokenizer(None)
    messages = [{"role": "user", "content": ONE_PART}, {"role": "user", "content": "x"}]
    assert tokenizer.decode(chat_prompt(tokenizer, messages)) == "Hello there\nx"


FUNCTION = {"name": "weather", "description": "Tells it", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        ("{{ t.function.name }}: {{ t.function.description }}", "weather: Tells it"),
        ("{{ t.name }}: {{ t.description }}", "weather: Tells it"),
        ("{{ t.type }} {{ (t.function if t.function else t).description }}", "function Tells it"),
    ],
    ids=["OpenAI's form", "bare functions", "either"],
)
def test_tools_come_in_the_form_that_the_template_reads(read: str, wanted: str) -> None:
    template = "{% for t in tools or [] %}" + read + "{% endfor %}"
    assert shown(template, [{"role": "user", "content": "hi"}], tools=[TOOL]) == wanted


WEATHER = {"name": "weather", "arguments": {"place": "Z\u00fcrich", "sunny": True}}
TIME = {"name": "time", "arguments": {}}


def called(*functions: dict[str, Any], content: str = "I look.") -> list[dict[str, Any]]:
    """A question, an answer with calls, and their results, the last one first."""
    calls = [{"id": f"of {one['name']}", "type": "function", "function": one} for one in functions]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"<{call['id']}>"} for call in calls]
    return [
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        *reversed(results),
    ]


RESULTS = "{% elif m.role == 'tool' %}({{ m.name }} {{ m.tool_call_id }}: {{ m.content }}){% endif %}"
CALLS = "{% for c in m.tool_calls %}[{{ c.function.name }} {{ ARGUMENTS }}]{% endfor %}"
TURNS = "{% for m in messages %}{% if m.tool_calls %}{{ m.content or '' }}" + CALLS + RESULTS + "{% endfor %}"
AS_OBJECT = TURNS.replace("ARGUMENTS", "c.function.arguments | tojson")


@pytest.mark.parametrize(
    "template",
    [
        AS_OBJECT,
        TURNS.replace("ARGUMENTS", "c.function.arguments"),
        TURNS.replace("{{ ARGUMENTS }}", "{{ '' + c.function.arguments }}"),
    ],
    ids=["an object", "any text", "a text"],
)
def test_arguments_are_what_the_template_reads(template: str) -> None:
    shown_as = 'I look.[weather {"place": "Z\u00fcrich", "sunny": true}][time {}](time of time: <of time>)'
    assert shown(template, called(WEATHER, TIME)) == shown_as + "(weather of weather: <of weather>)"


def test_calls_that_are_shown_without_content_alone_go_without() -> None:
    template = AS_OBJECT.replace("{% if m.tool_calls %}", "{% if m.content is none and m.tool_calls %}")
    assert shown(template, called(TIME, content="")) == "[time {}](time of time: <of time>)"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("granite", '<|tool_call|>[{"name": "weather", "arguments": {"place": "Z\u00fcrich", "sunny": true}}]'),
        ("lfm2-list", '<|tool_call_start|>[weather(place="Z\u00fcrich", sunny=True)]<|tool_call_end|>'),
    ],
)
def test_calls_that_the_template_leaves_out_are_written_into_the_content(name: str, wanted: str) -> None:
    text = shown(TEXT, called(WEATHER), calls=NOTATIONS[name])
    assert f"[assistant] I look.{wanted} [tool]" in text


REFUSES = "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        AS_OBJECT.replace("in m.tool_calls", "in m.tool_calls[:1]"),
        AS_OBJECT.replace("{% if m.tool_calls %}", "{% if m.tool_calls %}" + REFUSES),
    ],
    ids=["the first call alone", "no more than one"],
)
def test_calls_come_one_by_one_where_a_turn_has_one(template: str) -> None:
    text = 'I look.[weather {"place": "Z\u00fcrich", "sunny": true}](weather of weather: <of weather>)'
    assert shown(template, called(WEATHER, TIME)) == text + "[time {}](time of time: <of time>)"


def test_results_stand_within_the_turn_of_their_calls_where_they_are_read_there() -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls %}" + CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
        + "{% for r in m.tool_responses or [] %}({{ r.name }}: {{ r.response }}){% endfor %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )  # fmt: skip
    assert shown(template, called(TIME)) == "Well?[time {}](time: <of time>)"


def test_tools_are_told_of_in_words_where_the_template_shows_calls_and_takes_no_tools() -> None:
    deepseek = NOTATIONS["deepseek"]
    system = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    for messages, begins in ((system, "[system] Be brief\n\nYou have"), (system[1:], "[system] You have")):
        text = shown(TEXT, messages, tools=[TOOL], calls=deepseek)
        assert text.startswith(begins) and '"name": "weather"' in text and text.endswith("[user] hi ")
        assert "<\uff5ctool\u2581calls\u2581begin\uff5c>" in text
        fenced = shown(TEXT, messages, tools=[TOOL], calls=NOTATIONS["deepseek-v3"])
        assert "function<\uff5ctool\u2581sep\uff5c>NAME\n```json\nARGUMENTS\n```" in fenced
    takes = "{{ tools | length }}" + TEXT
    assert shown(takes, system, tools=[TOOL], calls=deepseek) == "1[system] Be brief [user] hi "


def test_ids_are_such_that_the_template_takes_them() -> None:
    text = shown(AS_OBJECT.replace("[{{", "[{{ c.id }} {{"), called(WEATHER, TIME), calls=NOTATIONS["kimi"])
    assert "[functions.weather:0 weather" in text and "(time functions.time:1: <of time>)" in text


def test_thoughts_come_under_the_name_that_the_template_reads() -> None:
    turns = [{"role": "assistant", "content": "four", "reasoning_content": "2 + 2"}]
    for name in ("reasoning_content", "thinking", "reasoning", "tool_plan"):
        template = "{% for m in messages %}{{ m." + name + " }}: {{ m.content }}{% endfor %}"
        assert shown(template, turns) == "2 + 2: four"


def test_a_tool_has_a_description_where_the_template_cannot_do_without() -> None:
    template = "{% for t in tools or [] %}{{ t.function.name + ':' + t.function.description }}{% endfor %}"
    bare = {"type": "function", "function": {"name": "time"}}
    assert shown(template, [{"role": "user", "content": "hi"}], tools=[bare, TOOL]) == "time:weather:Tells it"


def test_an_option_is_one_that_the_template_reads_not_one_that_it_mentions() -> None:
    template = (
        "{% set mine = 1 %}{# enable_thinking is not here #}Do your thinking first."
        "{% if reasoning is defined and reasoning %}{% generation %}x{% endgeneration %}{% endif %}"
        "{%- for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    assert [name for name in ("mine", "enable_thinking", "thinking", "m", "reasoning", "messages")
            if template_takes(tokenizer, name)] == ["reasoning", "messages"]  # fmt: skip


def test_a_template_that_cannot_be_parsed_is_searched_for_words() -> None:
    assert template_takes(byte_tokenizer("{% unknown_tag tools %}"), "tools")
    assert not template_takes(byte_tokenizer("{% unknown_tag tools %}"), "tool")
