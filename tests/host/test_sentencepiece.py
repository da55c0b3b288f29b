"""SentencePiece vocabularies: llama.cpp's pieces, and text that comes back as it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.host.tokenizers.sentencepiece import PieceSplitter
from hybrimoe_kt.host.tokenizers.tokenizer import load_tokenizer
from hybrimoe_kt.weights.gguf_file import GgufFile
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.vocabularies import TEXTS, WrittenVocabulary, mixed_texts, sentencepiece

from .llama_cpp import LlamaCpp

Generated = Callable[[Shape], GeneratedModel]

SPECIAL = ("<s>", "</s>", "<unk>", "<|im_end|>", "<think>", "</think>", "  ", "\u2581", "ana", "aaa")
WRITTEN = (
    "", " ", "   ", " hello", "  hello", "hello ", "a\n\nb", "\thello", "<s>hello</s>", "x<|im_end|> y",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<think>\nhello\n</think>\n\nworld",
    "<s>[INST] hello [/INST]he</s> [INST] hello [/INST]",
)  # fmt: skip


def shape(vocabulary: WrittenVocabulary) -> Shape:
    return Shape(vocabulary=vocabulary, hidden=64, inter=64, dense_inter=64, heads=2, kv_heads=1, layers=1)


@pytest.mark.parametrize(
    ("keys", "scores_per_piece"),
    [
        ({}, 1),
        ({"add_space_prefix": True}, 7),
        ({"add_space_prefix": False}, 1),
        ({"add_space_prefix": False, "add_bos_token": False}, 7),
        ({"add_eos_token": True, "remove_extra_whitespaces": True}, 1),
    ],
    ids=["no keys", "equal scores", "no space", "no space, no BOS, equal scores", "EOS"],
)
def test_tokens_are_llama_cpps(generated: Generated, keys: Mapping[str, Any], scores_per_piece: int) -> None:
    path = generated(shape(sentencepiece(scores_per_piece=scores_per_piece, **keys))).path
    tokenizer, llama_cpp = load_tokenizer(GgufFile(path), None), LlamaCpp(path)
    for text in (*WRITTEN, *TEXTS, *mixed_texts(150, SPECIAL)):
        assert tokenizer(text)["input_ids"] == llama_cpp.tokens(text), text


def test_text_comes_back_behind_the_space_that_was_put_before_it(generated: Generated) -> None:
    vocabulary = sentencepiece(add_bos_token=False, add_space_prefix=False)
    tokenizer = load_tokenizer(GgufFile(generated(shape(vocabulary)).path), None)
    for text in (*TEXTS, "  two  spaces  ", "<think>hm</think> yes"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    spaced = load_tokenizer(GgufFile(generated(shape(sentencepiece(add_bos_token=False))).path), None)
    assert spaced.decode(spaced("hello")["input_ids"]) == " hello"


def test_neighbours_of_equal_score_merge_from_the_left() -> None:
    splitter = PieceSplitter({"a": 0.0, "b": 0.0, "aa": -1.0, "aab": -2.0, "ba": -1.0})
    assert splitter.split("aaa") == ["aa", "a"]
    assert splitter.split("aba") == ["a", "ba"]
    assert splitter.split("aab") == ["aab"]
    assert splitter.split("xaay") == ["x", "aa", "y"]
    assert splitter.split("") == []


def test_long_texts_are_cut_in_blocks_without_a_trace(generated: Generated) -> None:
    path = generated(shape(sentencepiece())).path
    tokenizer, llama_cpp = load_tokenizer(GgufFile(path), None), LlamaCpp(path)
    text = " ".join(mixed_texts(900)) + "a" * 3000
    assert tokenizer(text)["input_ids"] == llama_cpp.tokens(text)


@pytest.fixture(scope="module")
def engine(generated: Generated) -> Engine:
    path = generated(shape(sentencepiece())).path
    return build_engine(path, progress=False, option_overrides={"cpu_backend": "torch_reference"})


def test_what_goes_on_with_a_text_keeps_its_first_space(engine: Engine, generated: Generated) -> None:
    vocabulary = sentencepiece()
    piece = next(token for token in vocabulary.tokens if re.fullmatch("\u2581[a-z]{2,}", token))
    biases = {vocabulary.id(piece): 100.0}
    sampling = Sampling(max_new_tokens=2, temperature=0, logit_bias=biases)
    llama_cpp = LlamaCpp(generated(shape(vocabulary)).path)
    text = f" {piece[1:]} {piece[1:]}"
    assert engine.complete("aa", sampling=sampling).text == text
    assert llama_cpp.complete("aa", 2, biases) == text


def test_tokens_texts_are_the_text_when_they_are_put_together(engine: Engine) -> None:
    vocabulary = engine.vocabulary
    for text in ("The quick brown fox's isn't", "  x  y"):
        tokens = vocabulary.text_ids(text)[1:]
        assert "".join(vocabulary.text_of(token) for token in tokens) == " " + text
    for text in TEXTS:  # whose characters may be of several tokens
        tokens = vocabulary.text_ids(text)[1:]
        stream = vocabulary.detokenizer()
        assert "".join(stream.step(token) for token in tokens) + stream.flush() == " " + text
