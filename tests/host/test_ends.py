"""Where a text begins and an answer ends: BOS, EOS and the tokens that end a generation, as llama.cpp has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.host.tokenizers.file_vocabulary import end_ids
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.vocabularies import CHATML, SPECIAL, byte_level, sentencepiece

from .llama_cpp import LlamaCpp

Generated = Callable[[Shape], GeneratedModel]

HI = [{"role": "user", "content": "hi"}]
SMALL: dict[str, Any] = {"hidden": 64, "inter": 64, "dense_inter": 64, "heads": 2, "kv_heads": 1, "layers": 1}
WITHOUT_BOS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"


def engine_of(model: GeneratedModel) -> Engine:
    return build_engine(model.path, progress=False, option_overrides={"cpu_backend": "torch_reference"})


@pytest.mark.parametrize(
    ("end", "keys"),
    [
        ("<|im_end|>", {"eos_token_id": 259}),
        ("<|endoftext|>", {"eos_token_id": 256}),
        ("<|eot_id|>", {"eos_token_id": 256}),
        ("<end_of_turn>", {"eos_token_id": 256}),
        ("<\uff5cend\u2581of\u2581sentence\uff5c>", {"eos_token_id": 256}),
        ("[EOT]", {"eos_token_id": 256}),
        ("[e~[", {"eos_token_id": 256}),
        ("<|call|>", {"eos_token_id": 256}),
        ("<turn|>", {"eos_token_id": 256}),
        ("<|nobody's end|>", {"eos_token_id": 256, "eot_token_id": 257}),
        ("<|nobody's end|>", {"eos_token_id": 256, "eom_token_id": 257}),
    ],
    ids=[
        "ChatML",
        "text",
        "llama-3",
        "gemma",
        "deepseek",
        "kimi",
        "minimax",
        "harmony",
        "gemma-4",
        "eot key",
        "eom key",
    ],
)
def test_an_answer_ends_where_llama_cpps_does(generated: Generated, end: str, keys: dict[str, int]) -> None:
    """However the file names its end: by a key, or only by what the token is called."""
    special = SPECIAL if end in SPECIAL else (SPECIAL[0], end, *SPECIAL[2:])
    vocabulary = byte_level("qwen2", special=special, **keys)
    model = generated(Shape(vocabulary=vocabulary, **SMALL))
    biases = {vocabulary.id(end): 100.0}
    theirs = LlamaCpp(model.path).chat(HI, 5, biases)
    ours = engine_of(model).chat(HI, sampling=Sampling(max_new_tokens=5, temperature=0, logit_bias=biases))
    assert (theirs["choices"][0]["finish_reason"], theirs["choices"][0]["message"]["content"]) == ("stop", "")
    assert (ours.reason, ours.text) == ("stop", "")


def test_other_control_tokens_do_not_end_it(generated: Generated) -> None:
    vocabulary = byte_level("qwen2", eos_token_id=259)
    model = generated(Shape(vocabulary=vocabulary, **SMALL))
    biases = {vocabulary.id("<|im_start|>"): 100.0}
    theirs = LlamaCpp(model.path).chat(HI, 3, biases)
    ours = engine_of(model).chat(HI, sampling=Sampling(max_new_tokens=3, temperature=0, logit_bias=biases))
    assert theirs["choices"][0]["finish_reason"] == ours.reason == "length"


@pytest.mark.parametrize("special", [("<|return|>", "<|call|>"), ("<|return|>", "x")], ids=["harmony", "other"])
def test_the_end_of_a_message_ends_the_answer_where_it_does_in_llama_cpp(
    generated: Generated, special: tuple[str, str]
) -> None:
    vocabulary = byte_level("qwen2", special=("<|endoftext|>", "<|end|>", "<|bos|>", *special))
    model = generated(Shape(vocabulary=vocabulary, **SMALL))
    biases = {vocabulary.id("<|end|>"): 100.0}
    theirs = LlamaCpp(model.path).chat(HI, 3, biases)
    ours = engine_of(model).chat(HI, sampling=Sampling(max_new_tokens=3, temperature=0, logit_bias=biases))
    assert ours.reason == theirs["choices"][0]["finish_reason"] == ("length" if "<|call|>" in special else "stop")


def test_answers_show_harmonys_channels_as_llama_cpps_do(generated: Generated) -> None:
    vocabulary = byte_level("gpt-4o", special=("<|endoftext|>", "<|channel|>", "<|bos|>", "<|im_end|>"))
    model = generated(Shape(vocabulary=vocabulary, **SMALL))
    biases = {vocabulary.id("<|channel|>"): 100.0}
    ours = engine_of(model).complete("hi", sampling=Sampling(max_new_tokens=2, temperature=0, logit_bias=biases))
    assert ours.text == LlamaCpp(model.path).complete("hi", 2, biases) == "<|channel|>" * 2


def test_end_ids_by_key_and_by_name() -> None:
    key = "tokenizer.ggml.{}_token_id".format
    ids = {"<|im_end|>": 1, "<|fim_pad|>": 2, "<|file_sep|>": 3, "<|im_start|>": 4, "</s>": 5}
    assert end_ids({}, ids) == {1, 2, 3, 5}
    assert end_ids({key("eos"): 9, key("fim_pad"): 8}, ids) == {1, 3, 5, 8, 9}
    assert end_ids({}, {"<|end|>": 1, "<|return|>": 2}) == {1, 2}
    assert end_ids({}, {"<|end|>": 1, "<|return|>": 2, "<|call|>": 3}) == {2, 3}
    assert end_ids({}, {"</s>": 1, "<|tool_response>": 2}) == {2}


@pytest.mark.parametrize("template", [WITHOUT_BOS, "{{ bos_token }}" + WITHOUT_BOS], ids=["without", "with"])
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("qwen2", {}),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}),
        ("llama-bpe", {}),
        ("llama-bpe", {"add_bos_token": False}),
        ("sentencepiece", {}),
        ("sentencepiece", {"add_bos_token": False, "add_eos_token": True}),
    ],
    ids=["qwen2", "qwen2 BOS EOS", "llama-bpe", "llama-bpe no BOS", "sentencepiece", "sentencepiece EOS, no BOS"],
)
def test_bos_and_eos_stand_where_llama_cpp_puts_them(
    generated: Generated, kind: str, keys: dict[str, bool], template: str
) -> None:
    """In a text and in a conversation; of the latter llama.cpp tells the number of tokens."""
    made = sentencepiece(**keys) if kind == "sentencepiece" else byte_level(kind, **keys)
    vocabulary = replace(made, chat_template=template)
    model = generated(Shape(vocabulary=vocabulary, **SMALL))
    engine, llama_cpp = engine_of(model), LlamaCpp(model.path)
    assert engine.vocabulary.text_ids("hi") == llama_cpp.tokens("hi")
    ids = engine.vocabulary.chat_ids(HI)
    bos = vocabulary.id("<s>" if kind == "sentencepiece" else "<|bos|>")
    assert len(ids) == llama_cpp.chat(HI, 1, {})["usage"]["prompt_tokens"]
    adds_bos = keys.get("add_bos_token", kind != "qwen2")
    assert ids.count(bos) == (1 if adds_bos or "bos_token" in template else 0)
    assert ids[0] == bos or ids.count(bos) == 0


def test_chatml_is_what_llama_cpp_makes_of_it(generated: Generated) -> None:
    model = generated(Shape(vocabulary=byte_level("qwen2"), **SMALL))
    engine, llama_cpp = engine_of(model), LlamaCpp(model.path)
    messages = [*HI, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "ha <|im_end|>"}]
    assert engine.vocabulary.chat_template == CHATML
    assert engine.vocabulary.chat_ids(messages) == llama_cpp.tokens(llama_cpp.rendered(messages))
