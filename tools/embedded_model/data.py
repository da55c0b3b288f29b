"""Prepared text as tokens: one file of token ids a part, read where it is mapped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

# Ids are positions in this list; the tokenizer is trained with them first.
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
# How much of a batch comes from each part; parts that are not prepared are left out.
DEFAULT_MIX = {"generated": 0.70, "chitchat": 0.18, "austen": 0.06, "wordnet": 0.04, "chatterbot": 0.02}


def render(document: dict) -> str:
    """A document, ``{"turns": [[role, text], ...]}`` or ``{"text": ...}``, as it is tokenised, without its end mark."""
    if "text" in document:
        return document["text"]
    return "".join(f"<|{role}|>{text}<|end|>" for role, text in document["turns"])


def parse_mix(text: str) -> dict[str, float]:
    """``part=weight,...`` as a dict; the default mix where ``text`` is empty."""
    if not text:
        return dict(DEFAULT_MIX)
    return {part: float(weight) for part, weight in (item.split("=") for item in text.split(","))}


class Corpus:
    """Token files of a prepared corpus directory."""

    def __init__(self, directory: Path) -> None:
        about = json.loads((directory / "corpus.json").read_text())
        self.vocab_size: int = about["vocab_size"]
        self.parts: list[str] = list(about["parts"])
        self._train = {p: np.memmap(directory / f"{p}.train.bin", np.uint16, "r") for p in self.parts}
        self._held = {p: np.memmap(directory / f"{p}.held.bin", np.uint16, "r") for p in self.parts}
        self._lengths = np.array(about["token_chars"])  # characters of each token; 0 for special ones
        self._starts = {p: np.flatnonzero(np.asarray(t) == 0)[:-1] + 1 for p, t in self._train.items()}

    def batch(self, mix: dict[str, float], rows: int, length: int, seed: tuple[int, ...]) -> torch.Tensor:
        """``[rows, length + 1]`` tokens; each row begins with a document of a part drawn by ``mix``."""
        random = np.random.default_rng(seed)
        known = [p for p in mix if p in self.parts]
        weights = np.array([mix[p] for p in known])
        chosen = random.choice(len(known), size=rows, p=weights / weights.sum())
        return torch.stack([self._row(known[part], length, random) for part in chosen])

    def _row(self, part: str, length: int, random: np.random.Generator) -> torch.Tensor:
        tokens, starts = self._train[part], self._starts[part]
        start = starts[random.integers(np.searchsorted(starts, len(tokens) - length - 1))]
        return torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))

    def held_out(self, part: str, rows: int, length: int) -> tuple[torch.Tensor, int]:
        """The first ``rows`` windows of the part's held-out text, and how many characters they predict."""
        tokens = self._held[part]
        rows = min(rows, (len(tokens) - 1) // length)
        table = np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(rows)]).astype(np.int64)
        return torch.from_numpy(table), int(self._lengths[table[:, 1:]].sum())
