"""Vocabularies merged by lists, under every name of a split: the tokens of llama.cpp, or a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from hybrimoe_kt.host.tokenizers.text_splits import TEXT_SPLITS
from hybrimoe_kt.host.tokenizers.tokenizer import _BY_SIZE, load_tokenizer
from hybrimoe_kt.weights.gguf_file import GgufFile
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.vocabularies import TEXTS, WrittenVocabulary, byte_level, character_level, mixed_texts

from .llama_cpp import LlamaCpp

Generated = Callable[[Shape], GeneratedModel]

SMALL = {"hidden": 64, "inter": 64, "dense_inter": 64, "heads": 2, "kv_heads": 1, "layers": 1}
WHOLE = ("Fox", " Fox", "FoX", "zq", " zq")  # tokens of which llama.cpp makes use where merges are ignored
SPLITS = (
    "qwen2", "qwen35", "llama-bpe", "tekken", "gpt-4o", "minimax-m2", "gpt-2", "olmo", "default", "deepseek-llm",
    "deepseek-coder", "deepseek-v3", "kimi-k2", "glm4", "smaug-bpe", "refact", "bailingmoe", "afmoe", "exaone-moe",
    "cohere2moe", "laguna",
)  # fmt: skip
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in TEXT_SPLITS if name not in SPLITS]
CHARACTERS = ("gemma4", "sarvam-moe")
NOT_LLAMA_CPPS = ("gpt2",)  # of files by others
LINES = ("a\n\n\nb\n\n\n\nc\n\n", "\u0967\u0968\u09694567 x12y 1234567x \u0967\u0968\u0969", "\u0001123456\u00017")


def vocabulary_of(pre: str) -> WrittenVocabulary:
    if pre in CHARACTERS:
        return character_level(pre, model="gemma4" if pre == "gemma4" else "gpt2")
    return byte_level(pre, whole=WHOLE)


@pytest.mark.parametrize("pre", [*SPLITS, *CHARACTERS, *LATER])
def test_tokens_are_llama_cpps(generated: Generated, pre: str, caplog: pytest.LogCaptureFixture) -> None:
    if pre in NOT_LLAMA_CPPS:
        assert TEXT_SPLITS[pre] == TEXT_SPLITS["gpt-2"]
        return
    path = generated(Shape(vocabulary=vocabulary_of(pre), **SMALL)).path  # type: ignore[arg-type]
    tokenizer, llama_cpp = load_tokenizer(GgufFile(path), None), LlamaCpp(path)
    texts = [*TEXTS, *mixed_texts(40), *LINES, "Fox Fox FoX zq zqj zq", "hi<|im_end|>\n<|im_start|> there", ""]
    for text in texts:
        assert tokenizer(text)["input_ids"] == llama_cpp.tokens(text), text
    assert not caplog.records


@pytest.mark.parametrize("pre", ["qwen2", *CHARACTERS])
def test_every_text_comes_back(generated: Generated, pre: str) -> None:
    path = generated(Shape(vocabulary=vocabulary_of(pre), **SMALL)).path  # type: ignore[arg-type]
    tokenizer = load_tokenizer(GgufFile(path), None)
    for text in (*TEXTS, *LINES, *mixed_texts(40, ("<|im_end|>",))):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("architecture", "pre", "guess"),
    [
        ("qwen3moe", None, "qwen2"),
        ("qwen35moe", None, "qwen35"),
        ("llama", None, "llama-bpe"),
        ("glm4moe", None, "glm4"),
        ("ernie4_5-moe", None, "default"),
        ("qwen3moe", "nobody's", "qwen2"),
    ],
)
def test_a_split_that_is_not_known_is_guessed_with_a_warning(
    generated: Generated, architecture: str, pre: str | None, guess: str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {**SMALL, "head_dim": 64}
    vocabulary, wanted = byte_level(pre), byte_level(guess)
    unnamed = generated(Shape(architecture=architecture, vocabulary=vocabulary, **sizes)).path  # type: ignore[arg-type]
    named = generated(Shape(architecture=architecture, vocabulary=wanted, **sizes)).path  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        guessed = load_tokenizer(GgufFile(unnamed), None)
    assert f"guessed: {guess}," in caplog.text
    assert repr(pre) in caplog.text or "does not say" in caplog.text
    exact = load_tokenizer(GgufFile(named), None)
    assert len(caplog.records) == 1
    for text in TEXTS:
        assert guessed(text)["input_ids"] == exact(text)["input_ids"], text


def test_families_that_share_an_architecture_are_told_apart_by_their_size(
    generated: Generated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = byte_level(None)
    monkeypatch.setitem(_BY_SIZE, len(vocabulary.tokens), "tekken")
    sizes = {**SMALL, "head_dim": 64}
    path = generated(Shape(architecture="llama", vocabulary=vocabulary, **sizes)).path  # type: ignore[arg-type]
    load_tokenizer(GgufFile(path), None)
    assert "guessed: tekken," in caplog.text
