"""The tokens of a text spell it, byte for byte, and stand where they are said to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hybrimoe_kt.engine.text.spelling import Spelling
from hybrimoe_kt.engine.text.token_bytes import TokenBytes

WORDS = ("▁", "▁Hello", "▁wor", "ld", "H", "é", "▁日")


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({one: number for number, one in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece(*, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """Scores prefer whole words, and what no word has is spelled by byte tokens; `<s>` begins every text."""
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((word, -1.0) for word in WORDS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


KINDS = {"byte-level": byte_level(), "sentencepiece": sentencepiece(), "metaspace": sentencepiece(metaspace=True)}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from("Helo wrd é日🙂"), max_size=12))
def test_the_tokens_of_a_prompt_spell_it(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    tokens = tokenizer(text)["input_ids"]
    spelled = Spelling(TokenBytes(tokenizer)).spell(text, tokens)
    if kind != "byte-level":
        assert spelled[0] == (b"<s>", 0)
        spelled = spelled[1:]
    if not text.startswith(" ") or kind == "byte-level":  # which SentencePiece has two of
        assert b"".join(one.bytes for one in spelled) == text.encode()
    before = b""
    for one in spelled:
        assert one.offset == len(before.decode(errors="ignore"))
        before += one.bytes


def test_special_tokens_count_where_the_text_has_them() -> None:
    tokenizer = KINDS["byte-level"]
    end, think = tokenizer.convert_tokens_to_ids(["<end>", "<think>"])
    a = tokenizer("a")["input_ids"][0]
    offsets = [one.offset for one in Spelling(TokenBytes(tokenizer)).spell("<end>a<think>a", [end, a, end, think, a])]
    assert offsets == [0, 5, 6, 6, 13]
    assert TokenBytes(tokenizer).is_special(end)
    assert not TokenBytes(tokenizer).is_special(think)
    assert TokenBytes(tokenizer)(10**6) == b""


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_an_answer_begins_with_a_space_or_without_as_its_text_does(kind: str) -> None:
    tokenizer = KINDS[kind]
    hello, ld = tokenizer.convert_tokens_to_ids(["▁Hello", "ld"])
    for text, first, second in (("Hellold", b"Hello", 5), (" Hellold", b" Hello", 6)):
        spelling = Spelling(TokenBytes(tokenizer))
        spelling.spell("H", tokenizer("H", add_special_tokens=False)["input_ids"])
        spelling.turn()
        one, two = spelling.spell(text, [hello, ld])
        assert (one.bytes, one.offset, two.offset) == (first, 1, 1 + second)


def test_characters_that_never_become_whole_count_as_their_text_shows_them() -> None:
    tokenizer = KINDS["byte-level"]
    tokens = [tokenizer(one)["input_ids"] for one in ("日", "x")]
    broken = [*tokens[0][:2], *tokens[1], *tokens[1]]
    text = tokenizer.backend_tokenizer.decode(broken)
    assert text == "\ufffdxx"
    assert [one.offset for one in Spelling(TokenBytes(tokenizer)).spell(text, broken)] == [0, 0, 0, 2]
