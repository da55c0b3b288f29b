"""What a GGUF file says of its vocabulary, with what llama.cpp takes for granted where it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrimoe_kt.errors import ModelError

__all__ = ["FileVocabulary", "TokenType", "end_ids"]

_KEY = "tokenizer.ggml."
_MODELS = ("gpt2", "llama", "gemma4")

_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
_INFILL_ENDS = {
    "fim_pad": frozenset(["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    "fim_rep": frozenset(["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    "fim_sep": frozenset(["<|file_sep|>"]),
}
_CONTROL_NAMES = _ENDS.union(*_INFILL_ENDS.values())
"""Texts of tokens that llama.cpp takes for ends of a generation, whatever type the file gives them."""
_SHOWN = frozenset(["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"])
"""Texts of Harmony's tokens that answers show, whatever type the file gives them."""
_END_KEYS = ("eos", "eot", "eom", *_INFILL_ENDS)
# Where a vocabulary has all of one of these, <|end|> ends a message within an answer and not the answer.
_MESSAGES_END = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"}, {"<|flush|>", "<|call|>"})


class TokenType:
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FileVocabulary:
    """The tokenizer's part of a file's metadata."""

    model: str
    """`gpt2`: bytes, merged by a list; `llama`: SentencePiece's, merged by scores; `gemma4`: characters, by a list."""
    split: str | None
    """What cuts a text before bytes are merged, by llama.cpp's name; None where the file does not say."""
    tokens: tuple[str, ...]
    """By id, each once: an empty one and the later of two equal ones have a made-up text."""
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    special: Mapping[str, int]
    """Ids of `bos`, `eos`, `unknown`, `padding` as far as there are any."""
    adds_bos: bool | None
    """None where the file leaves it to the kind of vocabulary."""
    adds_eos: bool
    adds_space: bool
    chat_template: str | None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> FileVocabulary:
        """Read it; ModelError for one that is not of a kind known here."""
        model = str(metadata.get(_KEY + "model"))
        if model not in _MODELS:
            raise ModelError(f"tokenizer.ggml.model {model!r} cannot be rebuilt here; valid: {', '.join(_MODELS)}")
        _check_kinds(metadata)
        tokens = _unique(metadata[_KEY + "tokens"])
        if model != "llama" and not metadata.get(_KEY + "merges"):
            raise ModelError("tokenizer.ggml.merges is missing, without which every byte would be a token")
        types = _types(tokens, metadata.get(_KEY + "token_type") or ())
        ids = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
        for name in ("bos", "eos", "unknown", "padding"):
            if (given := metadata.get(f"{_KEY}{name}_token_id")) is not None:
                ids[name] = int(given)
        return cls(
            model=model,
            split=model if model == "gemma4" else metadata.get(_KEY + "pre") or None,
            tokens=tokens,
            types=types,
            scores=tuple(metadata.get(_KEY + "scores") or (0.0,) * len(tokens)),
            merges=tuple(_merges(metadata.get(_KEY + "merges") or ())),
            special={name: number for name, number in ids.items() if 0 <= number < len(tokens)},
            adds_bos=None if model == "gemma4" else metadata.get(_KEY + "add_bos_token"),
            adds_eos=bool(metadata.get(_KEY + "add_eos_token", False)),
            adds_space=bool(metadata.get(_KEY + "add_space_prefix", model == "llama")),
            chat_template=metadata.get("tokenizer.chat_template") or None,
        )

    def text(self, name: str) -> str | None:
        """The text of a special token, None where there is none."""
        return self.tokens[self.special[name]] if name in self.special else None


_KINDS: dict[str, type | tuple[type, ...]] = {
    _KEY + "add_bos_token": bool,
    _KEY + "add_eos_token": bool,
    _KEY + "add_space_prefix": bool,
    _KEY + "merges": list,
    _KEY + "pre": str,
    _KEY + "scores": list,
    _KEY + "tokens": list,
    _KEY + "token_type": list,
    "tokenizer.chat_template": str,
}


def _check_kinds(metadata: Mapping[str, Any]) -> None:
    for key, kind in _KINDS.items():
        if key in metadata and not isinstance(metadata[key], kind):
            raise ModelError(f"{key} is {str(metadata[key])[:40]!r}, which is of the wrong type")
    scores = metadata.get(_KEY + "scores") or ()
    if not all(isinstance(score, int | float) for score in scores):
        raise ModelError(f"{_KEY}scores are not numbers")


def end_ids(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> set[int]:
    """Return what ends a generation: ids that metadata name and, of the special tokens `ids`, those llama.cpp knows."""
    named = {name: int(metadata[key]) for name in _END_KEYS if (key := f"{_KEY}{name}_token_id") in metadata}
    texts = _ENDS.union(*(texts for name, texts in _INFILL_ENDS.items() if name not in named))
    return {*named.values(), *(ids[text] for text in texts & ids.keys())} - _within_answers(ids)


def _within_answers(ids: Mapping[str, int]) -> set[int]:
    is_message = any(names <= ids.keys() for names in _MESSAGES_END)
    left_out = {"<|end|>"} if is_message else set()
    if "<|tool_response>" in ids:
        left_out.add("</s>")
    return {ids[text] for text in left_out & ids.keys()}


def _unique(tokens: list[str]) -> tuple[str, ...]:
    seen: set[str] = set()
    texts = []
    for number, text in enumerate(tokens):
        unique = text if text and text not in seen else f"[{'DUPLICATE' if text else 'EMPTY'}_{number}]"
        seen.add(unique)
        texts.append(unique)
    return tuple(texts)


def _types(tokens: tuple[str, ...], given: Any) -> tuple[int, ...]:
    types = list(given) or [TokenType.NORMAL] * len(tokens)
    if len(types) < len(tokens):
        raise ModelError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    return tuple(_type(text, kind) for text, kind in zip(tokens, types, strict=False))


def _type(text: str, given: int) -> int:
    if text in _SHOWN:
        return TokenType.USER_DEFINED
    return TokenType.CONTROL if text in _CONTROL_NAMES else given


def _merges(lines: Any) -> list[tuple[str, str]]:
    """Pairs, each once; a space at the beginning belongs to the first half."""
    pairs: dict[tuple[str, str], None] = {}
    for line in lines:
        at = line.find(" ", 1)
        if at > 0:
            pairs.setdefault((line[:at], line[at + 1 :]))
    return list(pairs)
