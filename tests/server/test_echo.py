"""How likely a prompt was, as evaluation harnesses ask for it, and several prompts in one request."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.engine.sampler import Sampled
from hybrimoe_kt.server.logprobs import ShownLogprobs
from tests.host.test_spelling import KINDS

from .scripted import ScriptedEngine
from .serving import Serving, serving

PLAIN = "/v1/completions"
CHOICES = [("Once upon a", " time"), ("Once upon a", " banana"), ("Good", " morning, all"), ("Zürich 日", "本 ok")]


def own_logprobs(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """`[num_tokens, vocab]`, one forward pass over all of them, which rounds keys and values as the engine does."""
    with torch.inference_mode():
        output = engine.model(torch.tensor([tokens]), past_key_values=engine.new_cache(), use_cache=True)
        return output.logits[0].float().log_softmax(-1)


def harness_sums(running: Serving, prompts: list[list[int]], contexts: list[int]) -> list[tuple[float, bool]]:
    """Log-likelihood of what follows each context, and whether it is the likeliest, as lm-eval computes them."""
    asked = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = running.post(PLAIN, asked).json()["choices"]
    sums = []
    for choice, context in zip(sorted(choices, key=lambda choice: choice["index"]), contexts, strict=True):
        own = choice["logprobs"]["token_logprobs"][context:-1]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][context:-1]]
        sums.append((sum(own), own == best))
    return sums


@pytest.mark.parametrize("batch", [1, 4])
def test_a_harness_gets_the_log_likelihoods_of_a_forward_pass(embedded: Serving, engine: Engine, batch: int) -> None:
    contexts = [len(engine.vocabulary.text_ids(context)) for context, _ in CHOICES]
    prompts = [engine.vocabulary.text_ids(context + more) for context, more in CHOICES]
    told = []
    for at in range(0, len(prompts), batch):
        told += harness_sums(embedded, prompts[at : at + batch], contexts[at : at + batch])
    for tokens, context, (total, is_likeliest) in zip(prompts, contexts, told, strict=True):
        logprobs = own_logprobs(engine, tokens)
        wanted = [float(logprobs[at - 1, tokens[at]]) for at in range(context, len(tokens))]
        assert total == pytest.approx(sum(wanted), abs=1e-3)
        likeliest = [int(logprobs[at - 1].argmax()) == tokens[at] for at in range(context, len(tokens))]
        assert is_likeliest == all(likeliest)
    assert told[0][1] and not told[1][1]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_prompt_of_text_and_nothing_after_it(embedded: Serving, engine: Engine, count: int) -> None:
    text = "Once upon a naïve 日"
    asked = {"prompt": text, "max_tokens": 0, "logprobs": count, "echo": True, "temperature": 0}
    answer = embedded.post(PLAIN, asked).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    told = choice["logprobs"]
    tokens = engine.vocabulary.text_ids(text)
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert len(told["tokens"]) == len(tokens) == answer["usage"]["prompt_tokens"]
    logprobs = own_logprobs(engine, tokens)
    wanted = [float(logprobs[at, token]) for at, token in enumerate(tokens[1:])]
    assert told["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-3)
    for at, best in enumerate(told["top_logprobs"][1:]):
        assert count <= len(best) <= count + 1  # the token itself besides
        assert max(best.values()) >= told["token_logprobs"][at + 1]
    assert b"".join(map(spelled, told["tokens"])) == text.encode()
    ids = embedded.post(PLAIN, {**asked, "prompt": tokens}).json()["choices"][0]
    assert (ids["text"], ids["logprobs"]["text_offset"]) == (text, told["text_offset"])


def spelled(token: str) -> bytes:
    """A shown token's bytes, by OpenAI's convention for parts of characters."""
    return bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()


def test_prompt_and_answer_are_one_text_whole_and_streamed(embedded: Serving) -> None:
    asked = {"prompt": "Once upon a", "max_tokens": 5, "logprobs": 1, "echo": True, "temperature": 0}
    whole = embedded.post(PLAIN, asked).json()["choices"][0]
    told = whole["logprobs"]
    assert "".join(told["tokens"]) == whole["text"]
    assert whole["text"].startswith("Once upon a time")
    assert told["text_offset"] == [len("".join(told["tokens"][:at])) for at in range(len(told["tokens"]))]
    pieces = stream(embedded, {**asked, "stream": True})
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    lists = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
    for name in told:
        streamed = [one for logprobs in lists for one in logprobs[name]]
        assert streamed == told[name]
    plain = embedded.post(PLAIN, {**asked, "logprobs": None}).json()["choices"][0]
    assert (plain["text"], plain["logprobs"]) == (whole["text"], None)
    pieces = stream(embedded, {**asked, "logprobs": None, "stream": True})
    assert "".join(piece["text"] for piece in pieces) == whole["text"]


def stream(running: Serving, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = running.post(PLAIN, body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [choice for line in lines[:-2] for choice in json.loads(line[6:])["choices"]]


def test_several_prompts_are_answered_in_their_order() -> None:
    engine = ScriptedEngine(lambda prompt: prompt.upper())
    with serving(engine, max_waiting=0) as running:
        prompts = ["one", "two", "three"]
        asked = {"prompt": prompts, "stop": "EE", "stream_options": {"include_usage": True}}
        answer = running.post(PLAIN, asked).json()
        said = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
        assert said == [(0, "ONE", "stop"), (1, "TWO", "stop"), (2, "THR", "stop")]
        assert answer["usage"]["prompt_tokens"] == 11
        pieces = stream(running, {**asked, "stream": True, "echo": True})
        for index, wanted in enumerate(("oneONE", "twoTWO", "threeTHR")):
            mine = [piece for piece in pieces if piece["index"] == index]
            assert "".join(piece["text"] for piece in mine) == wanted
            assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + ["stop"]
        ids = [running.service.engine.vocabulary.text_ids(prompt) for prompt in prompts]
        answer = running.post(PLAIN, {**asked, "prompt": ids, "echo": True}).json()
        assert [choice["text"] for choice in answer["choices"]] == ["oneONE", "twoTWO", "threeTHR"]
        refused = running.post(PLAIN, {"prompt": ["fine", "x" * 5000]})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert len(engine.prompts) == 9


def test_the_token_that_ended_an_answer_counts_for_a_harness() -> None:
    with serving(ScriptedEngine(lambda prompt: "")) as running:
        asked = {"prompt": "ab", "max_tokens": 1, "logprobs": 1, "echo": True}
        choice = running.post(PLAIN, asked).json()["choices"][0]
        assert choice["logprobs"]["tokens"] == ["a", "b", "<|im_end|>"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2]
        assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
        assert len(stream(running, {**asked, "stream": True})) == 3


def test_parts_of_characters_are_bytes_in_every_shape() -> None:
    text = "naïve 日本"
    with serving(ScriptedEngine(lambda prompt: text)) as running:
        asked = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1}
        for stream in (False, True):
            answer = running.post("/v1/chat/completions", {**asked, "stream": stream})
            parts = [answer.json()] if not stream else [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            told = [one for part in parts for one in (part["choices"][0]["logprobs"] or {"content": []})["content"]]
            assert bytes(byte for one in told for byte in one["bytes"]) == text.encode()
            assert b"".join(spelled(one["token"]) for one in told) == text.encode()
            assert told[2]["token"] == "bytes:\\xc3"
            assert [one["top_logprobs"][0]["bytes"] for one in told] == [one["bytes"] for one in told]
        ollama = {**asked, "model": "scripted", "options": {"num_predict": 8}}
        whole = running.post("/api/chat", {**ollama, "stream": False}).json()
        assert bytes(byte for one in whole["logprobs"] for byte in one["bytes"]) == text.encode()[:8]
        lines = [json.loads(line) for line in running.post("/api/chat", ollama).text.splitlines()]
        assert [one for line in lines for one in line.get("logprobs", [])] == whole["logprobs"]
        plain = running.post(PLAIN, {"prompt": "x", "logprobs": 0}).json()["choices"][0]
        assert b"".join(map(spelled, plain["logprobs"]["tokens"])) == text.encode()
        assert plain["logprobs"]["text_offset"][-4:] == [6, 7, 7, 7]


def test_tokens_of_one_text_keep_the_likelier() -> None:
    """Two tokens may be written alike; what a harness takes for the likeliest must stay it."""
    engine = ScriptedEngine()
    token = engine.vocabulary.text_ids("a")[0]

    shown = ShownLogprobs(engine.vocabulary)
    shown._bytes_of = lambda token: b"same"  # type: ignore[assignment]
    told = shown.of_completion("a", [Sampled(token, -3.0, ((7, -0.1), (8, -2.0)))])
    assert told["top_logprobs"] == [{"same": -0.1, "a": -3.0}]


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_a_sentencepiece_vocabularys_tokens_spell_prompt_and_answer(kind: str) -> None:
    """Its first space is no part of a text, and characters that it has no word for are several byte tokens."""
    engine = ScriptedEngine(lambda prompt: "Hello world 🙂 é")
    engine.tokenizer = KINDS[kind]
    engine.tokenizer.eos_token = "<s>"
    engine.vocabulary._tokenizer = engine.tokenizer
    with serving(engine) as running:
        for echo in (False, True):
            asked = {"prompt": "Hello 日", "logprobs": 1, "echo": echo}
            choice = running.post(PLAIN, asked).json()["choices"][0]
            assert choice["text"].endswith("Hello world 🙂 é")
            told = choice["logprobs"]
            assert told["tokens"][0] == "<s>"  # which the script has as well, and no text shows
            shown = [
                (token, at) for token, at in zip(told["tokens"], told["text_offset"], strict=True) if token != "<s>"
            ]
            assert b"".join(spelled(token) for token, _ in shown) == choice["text"].encode()
            assert all(choice["text"][at:].startswith(token) for token, at in shown if not token.startswith("bytes:"))
        body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "temperature": 0}
        content = running.post("/v1/chat/completions", body).json()["choices"][0]
        told = [one for one in content["logprobs"]["content"] if one["token"] != "<s>"]
        text = content["message"]["content"].removeprefix("<s>")
        assert bytes(byte for one in told for byte in one["bytes"]) == text.encode()
