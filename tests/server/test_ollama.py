"""Ollama's own Python client against the server."""

from __future__ import annotations

import ollama
import pytest

from .scripted import ScriptedEngine
from .serving import Serving, serving
from .test_openai import CALLS, WEATHER

HI = [{"role": "user", "content": "Good morning."}]
OPTIONS = {"num_predict": 8, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(embedded: Serving) -> ollama.Client:
    return ollama.Client(host=embedded.url)


def test_what_is_served(tiny: ollama.Client, embedded: Serving) -> None:
    assert [model.model for model in tiny.list().models] == ["small-talk"]
    assert [model.model for model in tiny.ps().models] == ["small-talk"]
    shown = tiny.show("small-talk:latest")
    assert shown.details.family == "qwen3_moe"
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo["qwen3_moe.context_length"] == 1024
    assert embedded.http.get("/api/version").json()["version"].count(".") == 2


def test_a_chat_whole_and_streamed_is_the_same_and_openais(tiny: ollama.Client, embedded: Serving) -> None:
    whole = tiny.chat("small-talk", HI, options=OPTIONS)
    assert whole.done
    assert (whole.done_reason, whole.eval_count) == ("length", 8)
    assert whole.prompt_eval_count > 3
    assert whole.total_duration >= whole.eval_duration > 0
    parts = list(tiny.chat("small-talk", HI, options=OPTIONS, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    other = embedded.ask("Good morning.", max_tokens=8, temperature=0).json()
    assert other["choices"][0]["message"]["content"] == whole.message.content


def test_generate_with_a_template_and_without(tiny: ollama.Client) -> None:
    answer = tiny.generate("small-talk", "Good morning.", options=OPTIONS)
    assert answer.response == tiny.chat("small-talk", HI, options=OPTIONS).message.content
    raw = tiny.generate("small-talk", "Once upon a time", raw=True, options=OPTIONS)
    assert raw.response
    assert raw.response != tiny.generate("small-talk", "Once upon a time", options=OPTIONS).response
    parts = list(tiny.generate("small-talk", "Good morning.", options=OPTIONS, stream=True))
    assert "".join(part.response for part in parts) == answer.response


def test_a_model_may_be_loaded_by_asking_for_nothing(tiny: ollama.Client) -> None:
    assert tiny.generate("small-talk").done_reason == "load"
    assert tiny.chat("small-talk").done_reason == "load"


def test_what_ollama_has_besides_one_model() -> None:
    with serving(ScriptedEngine()) as running:
        made = ollama.Client(host=running.url)
        assert made.pull("scripted").status == "success"
        assert [part.status for part in made.pull("scripted", stream=True)] == ["success"]
        for ask, wanted in (
            (lambda: made.pull("llama3"), "'llama3' not found; the one served is 'scripted'"),
            (lambda: made.embed("scripted", "x"), "makes no embeddings"),
            (lambda: made.embeddings("scripted", "x"), "makes no embeddings"),
            (lambda: made.delete("scripted"), "keeps it as it is"),
            (lambda: made.copy("scripted", "other"), "keeps it as it is"),
        ):
            with pytest.raises(ollama.ResponseError, match=wanted) as refused:
                ask()
            assert refused.value.status_code == 404


def test_every_option_reaches_the_sampling() -> None:
    engine = ScriptedEngine()
    given = {"num_predict": 6, "temperature": 0.5, "top_p": 0.4, "top_k": 3, "min_p": 0.2, "repeat_penalty": 1.3,
             "frequency_penalty": 0.1, "presence_penalty": 0.3, "seed": 11}  # fmt: skip
    with serving(engine) as running:
        ollama.Client(host=running.url).chat("scripted", HI, options=given | {"num_ctx": 2048})
        sampling = engine.samplings[-1]
        names = {"num_predict": "max_new_tokens", "repeat_penalty": "repetition_penalty"}
        assert {name: getattr(sampling, names.get(name, name)) for name in given} == given
        ended = ollama.Client(host=running.url).chat("scripted", HI, options={"stop": ["morn"], "num_predict": -1})
        assert (ended.message.content, ended.done_reason) == ("echo: Good ", "stop")
        system = ollama.Client(host=running.url).generate("scripted", "Hi", system="Be kind.")
        assert system.response == "echo: Hi"
        assert "<|im_start|>system\nBe kind." in engine.prompts[-1]


def test_tool_calls_and_thoughts() -> None:
    with serving(ScriptedEngine(lambda prompt: "<think>hm</think>" + CALLS)) as running:
        made = ollama.Client(host=running.url)
        assert made.show("scripted").capabilities == ["completion", "tools", "thinking"]
        message = made.chat("scripted", HI, tools=[WEATHER]).message
        assert message.thinking == "hm"
        assert [(call.function.name, dict(call.function.arguments)) for call in message.tool_calls] == [
            ("weather", {"place": "Zürich", "days": 2}),
            ("weather", {"place": "Bern"}),
        ]
        parts = list(made.chat("scripted", HI, tools=[WEATHER], stream=True))
        streamed = [call.function.arguments["place"] for part in parts for call in part.message.tool_calls or []]
        assert streamed == ["Zürich", "Bern"]
        history = [
            *HI,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_name": "weather", "content": "ok"},
        ]
        assert made.chat("scripted", history, tools=[WEATHER], think=False).done


@pytest.mark.parametrize(
    ("body", "status", "wanted"),
    [
        ({"model": "other", "messages": HI}, 404, "model 'other' not found"),
        ({"model": "scripted", "messages": HI, "format": "xml"}, 400, 'format is "json" or a JSON schema'),
        ({"model": "scripted", "messages": HI, "options": {"mirostat": 2}}, 400, "mirostat is not supported"),
        ({"model": "scripted", "messages": HI, "top_logprobs": 2}, 400, "needs logprobs"),
        ({"model": "scripted", "messages": HI, "options": {"temperature": -1}}, 400, "options.temperature"),
        ({"model": "scripted", "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images"),
        ({"messages": HI}, 400, "model: Field required"),
    ],
)
def test_refusals_have_ollamas_shape(echoing: Serving, body: dict[str, object], status: int, wanted: str) -> None:
    answer = echoing.post("/api/chat", body)
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert wanted in answer.json()["error"]


def test_the_client_sees_errors_before_and_within_a_stream() -> None:
    def fail(number: int, stop: object) -> None:
        if number == 3:
            raise RuntimeError("broken")

    with serving(ScriptedEngine(before_token=fail)) as running:
        made = ollama.Client(host=running.url)
        with pytest.raises(ollama.ResponseError, match="not found") as missing:
            made.chat("other", HI)
        assert missing.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="inside the server"):
            list(made.chat("scripted", HI, stream=True))
