"""OpenAI's own Python client against the server: the embedded model, and a scripted one where the text matters."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.engine.sampling import Sampling

from .scripted import ScriptedEngine
from .serving import Serving, serving

HELLO = [{"role": "user", "content": "Hello! How are you today?"}]


def client(running: Serving, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def tiny(embedded: Serving) -> Iterator[OpenAI]:
    with client(embedded) as made:
        yield made


def test_models(tiny: OpenAI) -> None:
    listed = tiny.models.list().data
    assert [model.id for model in listed] == ["small-talk"]
    assert tiny.models.retrieve("small-talk").id == "small-talk"
    with pytest.raises(openai.NotFoundError) as refused:
        tiny.models.retrieve("other/model")
    assert refused.value.code == "model_not_found"


def test_a_chat_whole_and_streamed_is_what_the_engine_says(tiny: OpenAI, engine: Engine) -> None:
    asked = {"model": "small-talk", "messages": HELLO, "max_tokens": 10, "temperature": 0}
    whole = tiny.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    stream = tiny.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == text
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens == 10
    assert usage.prompt_tokens == whole.usage.prompt_tokens == len(engine.vocabulary.chat_ids(HELLO))
    assert usage.total_tokens == usage.prompt_tokens + 10
    assert "".join(engine.stream(HELLO, sampling=Sampling(max_new_tokens=10, temperature=0))) == text


def test_a_conversation_that_goes_on_reuses_its_beginning(tiny: OpenAI) -> None:
    turns = [{"role": "user", "content": "What is the tallest mountain of all, and who was there first?"}]
    seen = 0
    for _ in range(3):
        answer = tiny.chat.completions.create(model="small-talk", messages=turns, max_tokens=8, temperature=0)
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached >= seen
        seen = answer.usage.prompt_tokens
        turns += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "Go on."},
        ]


def test_two_clients_with_one_beginning_get_what_each_would_alone(tiny: OpenAI, engine: Engine) -> None:
    shared = "A long beginning that both conversations have, word for word, before they part: "
    asked = [[{"role": "user", "content": shared + end}] for end in ("apples.", "pears, and more.")]

    def say(messages: list[dict[str, str]]) -> str:
        answer = tiny.chat.completions.create(model="small-talk", messages=messages, max_tokens=8, temperature=0)
        return answer.choices[0].message.content

    alone = []
    for messages in asked:
        engine.reset()
        alone.append(say(messages))
    assert [say(asked[turn % 2]) for turn in range(6)] == alone * 3


def test_a_plain_completion_from_text_and_from_tokens(tiny: OpenAI, engine: Engine) -> None:
    prompt = "Once upon a time"
    asked = {"model": "small-talk", "max_tokens": 8, "temperature": 0}
    text = tiny.completions.create(prompt=prompt, **asked).choices[0].text
    assert text
    assert tiny.completions.create(prompt=engine.vocabulary.text_ids(prompt), **asked).choices[0].text == text
    assert tiny.completions.create(prompt=[prompt], **asked).choices[0].text == text
    streamed = [chunk.choices[0].text for chunk in tiny.completions.create(prompt=prompt, stream=True, **asked)]
    assert "".join(streamed) == text


def test_the_seed_and_the_temperature_decide(tiny: OpenAI) -> None:
    def say(**how: object) -> str:
        answer = tiny.chat.completions.create(model="small-talk", messages=HELLO, max_tokens=12, **how)
        return answer.choices[0].message.content

    assert say(seed=5, temperature=1.5) == say(seed=5, temperature=1.5) != say(seed=6, temperature=1.5)
    narrow = {"temperature": 1.5, "seed": 7}
    greedy = say(temperature=0)
    assert say(**narrow, extra_body={"top_k": 1}) == greedy
    assert say(**narrow, extra_body={"min_p": 1.0}) == greedy
    assert say(**narrow, top_p=1e-6) == greedy
    assert say(temperature=0, extra_body={"repetition_penalty": 5.0}) != greedy


def test_a_bias_forbids_and_forces_a_token(tiny: OpenAI, engine: Engine) -> None:
    asked = {"model": "small-talk", "messages": HELLO, "temperature": 0}
    first = tiny.chat.completions.create(**asked, max_tokens=1).choices[0].message.content
    token = engine.vocabulary.text_ids(" mountain")[0]
    forced = tiny.chat.completions.create(**asked, max_tokens=3, logit_bias={str(token): 100})
    assert forced.choices[0].message.content == engine.tokenizer.decode([token] * 3)
    banned = {str(id): -100 for id in range(len(engine.tokenizer)) if engine.tokenizer.decode([id]) == first}
    assert banned
    other = tiny.chat.completions.create(**asked, max_tokens=1, logit_bias=banned).choices[0].message.content
    assert other != first
    with pytest.raises(openai.BadRequestError, match="names tokens from 0 to"):
        tiny.chat.completions.create(**asked, logit_bias={"99999": 1})
    with pytest.raises(openai.BadRequestError, match="by its id"):
        tiny.chat.completions.create(**asked, logit_bias={"hello": 1})


def test_logprobs_tell_of_every_token(tiny: OpenAI) -> None:
    asked = {"model": "small-talk", "messages": HELLO, "temperature": 0, "max_tokens": 6}
    answer = tiny.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    assert "".join(one.token for one in told) == answer.choices[0].message.content
    for one in told:
        values = [best.logprob for best in one.top_logprobs]
        assert one.logprob == values[0] == max(values)
        assert len(values) == 3
        assert bytes(one.bytes).decode() == one.token
    chunks = list(tiny.chat.completions.create(**asked, logprobs=True, stream=True))
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in told]
    plain = tiny.completions.create(model="small-talk", prompt="Once", max_tokens=4, temperature=0, logprobs=2)
    shown = plain.choices[0].logprobs
    assert "".join(shown.tokens) == plain.choices[0].text
    assert [len(best) for best in shown.top_logprobs] == [2] * 4
    assert shown.text_offset == [len("".join(shown.tokens[:at])) for at in range(4)]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_are_not_said(stream: bool) -> None:
    """Every character is a token of its own here, so each stop string spans several."""
    with serving(ScriptedEngine(lambda prompt: "one, two, three, four")) as running, client(running) as made:
        for stop, wanted in ((" three", "one, two,"), ([", t", "wo"], "one"), ("nowhere", "one, two, three, four")):
            answer = made.chat.completions.create(model="scripted", messages=HELLO, stop=stop, stream=stream)
            pieces = list(answer) if stream else []
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            choice = pieces[-1].choices[0] if stream else answer.choices[0]
            assert (text if stream else choice.message.content) == wanted
            assert choice.finish_reason == "stop"


def test_characters_are_never_cut_in_a_stream() -> None:
    text = "naïve 日本語 👩‍👩‍👧 e\u0301 \u0000 end"
    with serving(ScriptedEngine(lambda prompt: text)) as running, client(running) as made:
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in made.chat.completions.create(model="scripted", messages=HELLO, stream=True)
        ]
        assert "".join(pieces) == text
        assert not any("�" in piece for piece in pieces)
        cut = made.chat.completions.create(model="scripted", messages=HELLO, max_tokens=len("naïve 日".encode()) - 1)
        assert cut.choices[0].message.content == "naïve �"
        assert cut.choices[0].finish_reason == "length"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Zürich", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call>'
)


def test_tool_calls_whole_and_streamed() -> None:
    engine = ScriptedEngine(lambda prompt: CALLS)
    with serving(engine) as running, client(running) as made:
        asked = {"model": "scripted", "messages": HELLO, "tools": [WEATHER]}
        choice = made.chat.completions.create(**asked).choices[0]
        assert "The weather of a place." in engine.prompts[-1]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content.strip() == "Let me see."
        wanted = [("weather", {"place": "Zürich", "days": 2}), ("weather", {"place": "Bern"})]
        calls = choice.message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == wanted
        assert len({call.id for call in calls}) == 2

        chunks = [chunk.choices[0] for chunk in made.chat.completions.create(**asked, stream=True)]
        streamed = [call for choice in chunks for call in choice.delta.tool_calls or []]
        assert [(call.index, call.function.name) for call in streamed] == [(0, "weather"), (1, "weather")]
        assert [json.loads(call.function.arguments) for call in streamed] == [arguments for _, arguments in wanted]
        assert "".join(choice.delta.content or "" for choice in chunks).strip() == "Let me see."
        assert chunks[-1].finish_reason == "tool_calls"

        one = made.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
        assert len(one.message.tool_calls) == 1
        none = made.chat.completions.create(**asked, tool_choice="none").choices[0]
        assert none.message.content == CALLS
        assert "weather of a place" not in engine.prompts[-1]

        answered = [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [calls[1].model_dump()]},
            {"role": "tool", "tool_call_id": calls[1].id, "content": "sunny"},
        ]
        made.chat.completions.create(model="scripted", messages=answered, tools=[WEATHER])
        assert '<tool_call>{"name": "weather", "arguments": {"place": "Bern"}}</tool_call>' in engine.prompts[-1]
        assert "<|im_start|>tool\nsunny" in engine.prompts[-1]


@pytest.mark.parametrize(
    "text", ["<tool_call>{not json}</tool_call> sorry", "a <tool_call>{", '<tool_call>["x"]</tool_call>']
)
def test_what_is_no_tool_call_stays_text(text: str) -> None:
    with serving(ScriptedEngine(lambda prompt: text)) as running, client(running) as made:
        asked = {"model": "scripted", "messages": HELLO, "tools": [WEATHER]}
        choice = made.chat.completions.create(**asked).choices[0]
        assert choice.message.content == text
        assert not choice.message.tool_calls
        assert choice.finish_reason == "stop"
        chunks = made.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_thoughts_are_told_apart() -> None:
    engine = ScriptedEngine(lambda prompt: "yes" if "</think>" in prompt else "<think>hmm\nno</think>yes")
    with serving(engine) as running, client(running) as made:
        message = made.chat.completions.create(model="scripted", messages=HELLO).choices[0].message
        assert (message.content, message.reasoning_content) == ("yes", "hmm\nno")
        chunks = list(made.chat.completions.create(model="scripted", messages=HELLO, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hmm\nno"
        assert "".join(delta.content or "" for delta in deltas) == "yes"
        options = {"chat_template_kwargs": {"enable_thinking": False}}
        plain = made.chat.completions.create(model="scripted", messages=HELLO, extra_body=options).choices[0].message
        assert plain.content == "yes"
        assert not hasattr(plain, "reasoning_content")


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_stream() -> None:
    def fail(number: int, stop: object) -> None:
        if number == 4:
            raise RuntimeError("a secret path /home/x")

    with serving(ScriptedEngine(before_token=fail)) as running, client(running) as made:
        said: list[str] = []
        stream = made.chat.completions.create(model="scripted", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="inside the server") as failed:
            said.extend(chunk.choices[0].delta.content or "" for chunk in stream)
        assert "".join(said) == "echo"
        assert "secret" not in str(failed.value.body)
        with pytest.raises(openai.InternalServerError, match="inside the server"):
            made.chat.completions.create(model="scripted", messages=HELLO)
        assert running.http.get("/health").status_code == 200


def test_parts_of_a_message_and_the_developer_role(echoing: Serving) -> None:
    with client(echoing) as made:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
        answer = made.chat.completions.create(model="scripted", messages=messages, max_completion_tokens=9)
        assert answer.choices[0].message.content == "echo: a\nb"
        prompt = echoing.service.engine.prompts[-1]  # type: ignore[attr-defined]
        assert "<|im_start|>system\nbe brief" in prompt
