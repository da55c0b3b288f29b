"""Vocabularies to write into generated files, small and of the kinds that released files have."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["TEXTS", "WrittenVocabulary", "byte_level", "character_level", "mixed_texts", "sentencepiece"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = ("<|im_end|>", "<|im_start|>", "<|bos|>", "<|endoftext|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXTS = (
    "The quick brown fox's isn't we'LL IT'S CamelCaseWords getUserName HTTPServer",
    "Быстрая лиса МоскваРоссия прыгает 123",
    "快速的棕色狐狸 中文，标点。ひらがなカタカナ漢字",
    "नमस्ते दुनिया हिन्दी में १२३",
    "مرحبا بالعالم ١٢٣ كيف حالك",
    "สวัสดีชาวโลก ยินดี",
    "안녕하세요 세계 한국어",
    "Καλημέρα κόσμε ΑΒγ",
    "שלום עולם",
    "🙂🙂 👨‍👩‍👧‍👦 🇩🇪 ✌🏽",
    "def f(x):\n    return x**2  # ok\n\n\tif (a != b) { c += 1; }\r\n",
    "   trailing  \n \n  x \t\t y ",
    "1234567 12 3.14 1,000,000 ½ ²³ Ⅷ",
    "École Élan naïveté ÉCOLE éÉ straße ſt ﬁ ǅ ƻ ʔ",
    '$12.50 +<=>^~|` "quoted" (paren) [x] {y} <z> `code`',
    "a\u00a0b\u2003c\u3000d\u200be\u200df\u0085g\u000bh\u000ci",
    "e\u0301 a\u0308 。、！？「」…—–‘’“” /usr/bin/x.py //\n",
    "aaaaaaa banananana 's 'S 'ſ x'ſ 'll 'Re",
)
"""Ten scripts, emoji, code, numbers and white space of every kind."""


def mixed_texts(number: int, special: Sequence[str] = ()) -> list[str]:
    """Pieces of `TEXTS` and `special` tokens, put together at random; the same every time."""
    draw = random.Random(number)
    pieces = [piece for text in TEXTS for piece in re.findall(r"\w{1,4}|\s+|[^\w\s]{1,2}", text)] + list(special) * 10
    return ["".join(draw.choices(pieces, k=draw.randint(1, 14))) for _ in range(number)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenVocabulary:
    """What stands under `tokenizer.ggml` in a file; `keys` are further ones, their values integers, flags or texts."""

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[tuple[str, str], ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str = CHATML

    def __hash__(self) -> int:
        return hash((self.model, self.tokens, tuple(self.keys.items()), self.chat_template))

    def id(self, text: str) -> int:
        """The id of a token."""
        return self.tokens.index(text)

    def write(self, writer: GGUFWriter) -> None:
        """Add all keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_token_list([token.encode() for token in self.tokens])
        writer.add_token_types(list(self.types))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        if self.merges:
            writer.add_token_merges([" ".join(pair) for pair in self.merges])
        for name, value in self.keys.items():
            key = f"tokenizer.ggml.{name}"
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            else:
                writer.add_uint32(key, value)
        writer.add_chat_template(self.chat_template)


def byte_level(
    pre: str | None, *, special: Sequence[str] = SPECIAL, whole: Sequence[str] = (), **keys: Any
) -> WrittenVocabulary:
    """Bytes, merges learnt without regard to words, `special` tokens, and `whole` words that no merges make."""
    spelling = bytes_to_unicode()
    merges = _learnt_merges()
    words = ("".join(spelling[byte] for byte in word.encode()) for word in whole)
    plain = dict.fromkeys([*spelling.values(), *special, *("".join(pair) for pair in merges), *words])
    return WrittenVocabulary(
        model="gpt2",
        tokens=tuple(plain),
        types=tuple(CONTROL if token in special else NORMAL for token in plain),
        merges=merges,
        keys={"eos_token_id": 256, "bos_token_id": 258} | ({} if pre is None else {"pre": pre}) | keys,
    )


@cache
def _learnt_merges() -> tuple[tuple[str, str], ...]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(backend, trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False))


def _trained(backend: Tokenizer, trainer: trainers.BpeTrainer) -> tuple[tuple[str, str], ...]:
    backend.train_from_iterator([*TEXTS * 3, *mixed_texts(300)], trainer)
    return tuple((a, b) for a, b in json.loads(backend.to_str())["model"]["merges"])


def character_level(pre: str, *, model: str = "gpt2", **keys: Any) -> WrittenVocabulary:
    """Bytes, pieces learnt without regard to words, up to three empty lines, and the special tokens of Gemma 4."""
    special = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN, "<turn|>": CONTROL}
    bytes_ = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    merges = _learnt_merges_of_characters()
    pieces = [
        *sorted({character for pair in merges for character in "".join(pair)}),
        *("".join(pair) for pair in merges),
    ]
    tokens = {**special, **bytes_, **dict.fromkeys(["\n", "\n\n", "\n\n\n", "\n\n\n\n", *pieces], NORMAL)}
    return WrittenVocabulary(
        model=model, tokens=tuple(tokens), types=tuple(tokens.values()), merges=merges,
        keys={"eos_token_id": 1, "bos_token_id": 2, "unknown_token_id": 3, "padding_token_id": 0, "pre": pre} | keys,
    )  # fmt: skip


@cache
def _learnt_merges_of_characters() -> tuple[tuple[str, str], ...]:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), behavior="isolated")
    learnt = _trained(backend, trainers.BpeTrainer(vocab_size=1500, limit_alphabet=120, show_progress=False))
    return tuple(pair for pair in learnt if "\n" not in "".join(pair))


def sentencepiece(*, scores_per_piece: int = 1, **keys: Any) -> WrittenVocabulary:
    """Bytes, pieces learnt without regard to words, ChatML's and `<think>` tokens; neighbours may share a score."""
    special = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    added = {"<|im_end|>": CONTROL, "<|im_start|>": CONTROL, "<think>": USER_DEFINED, "</think>": USER_DEFINED}
    pieces = [piece for piece in _learnt_pieces() if piece not in special | added]
    bytes_ = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    tokens = {**special, **bytes_, **dict.fromkeys(pieces, NORMAL), **added}
    scores = [0.0] * 259 + [-float(at // scores_per_piece) for at in range(len(pieces))] + [0.0] * len(added)
    return WrittenVocabulary(
        model="llama", tokens=tuple(tokens), types=tuple(tokens.values()), scores=tuple(scores), keys=keys
    )  # fmt: skip


@cache
def _learnt_pieces() -> tuple[str, ...]:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    _trained(backend, trainers.BpeTrainer(vocab_size=1500, limit_alphabet=120, show_progress=False))
    return tuple(sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__))
