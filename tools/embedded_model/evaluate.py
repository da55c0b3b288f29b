"""Measures GGUF files on held-out text: bits per character by part, and how evenly the experts are used.

    python -m tools.embedded_model.evaluate hybrimoe_kt/models/small-talk-q4_k.gguf --data .cache/corpus \\
        --against tiny-qwen3moe-q4_k.gguf

Every file splits the same text with its own tokenizer, so bits are counted per character of text, and marks of turns
count neither as bits nor as characters. The weights are the file's: what quantisation costs is in the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hybrimoe_kt.host.tokenizers.tokenizer import load_tokenizer
from hybrimoe_kt.weights.gguf_file import GgufFile

from .data import SPECIAL_TOKENS
from .import_gguf import read
from .model import Model

PIECE_CHARS = 600  # of a document; every tokenizer here makes fewer than the 256 tokens of training from most of them


@dataclass
class Tally:
    """Sums over a part's text."""

    nats: float = 0.0
    chars: int = 0
    tokens: int = 0

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.chars

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


@dataclass
class Report:
    """What was measured of one file."""

    parts: dict[str, Tally] = field(default_factory=dict)
    loads: torch.Tensor | None = None
    """Routings of every expert, ``[num_layers, num_experts]``."""

    def entropies(self) -> list[float]:
        """Each layer's utilisation entropy over its maximum, ln E."""
        assert self.loads is not None
        share = self.loads / self.loads.sum(1, keepdim=True)
        return (-(share * share.clamp_min(1e-12).log()).sum(1) / math.log(share.shape[1])).tolist()

    def num_dead(self) -> int:
        assert self.loads is not None
        return int((self.loads == 0).sum())


def pieces(texts: list[str], max_chars: int) -> list[str]:
    """The beginnings of documents, ``PIECE_CHARS`` each, until ``max_chars``; no mark of a turn is cut in two."""
    found: list[str] = []
    for text in texts:
        piece = text[:PIECE_CHARS]
        cut = piece.rfind("<|")
        if cut >= 0 and "|>" not in piece[cut:]:
            piece = piece[:cut]
        found.append(piece)
        max_chars -= len(piece)
        if max_chars <= 0:
            break
    return found


@torch.no_grad()
def measure(path: Path, texts: dict[str, list[str]], max_chars: int) -> Report:
    """Evaluate one file on every part's pieces."""
    model, tokenizer, report = read(path), load_tokenizer(GgufFile(path), None), Report()
    loads = torch.zeros(model.shape.num_layers, model.shape.num_experts)
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    for part, documents in texts.items():
        report.parts[part] = tally = Tally()
        for piece in pieces(documents, max_chars):
            _add(tally, loads, model, tokenizer, piece, special)
    report.loads = loads
    return report


def _add(
    tally: Tally, loads: torch.Tensor, model: Model, tokenizer: PreTrainedTokenizerBase, text: str, special: set[int]
) -> None:
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
    logits = model(ids)[0, :-1]
    targets = ids[0, 1:]
    plain = torch.tensor([token not in special for token in targets.tolist()])
    tally.nats += F.cross_entropy(logits, targets, reduction="none")[plain].sum().item()
    tally.tokens += int(plain.sum())
    for mark in SPECIAL_TOKENS:
        text = text.replace(mark, "")
    tally.chars += len(text)
    loads += torch.stack([block.moe.load for block in model.blocks]) * (ids.shape[1] * model.shape.top_k)


def held_out_texts(data: Path) -> dict[str, list[str]]:
    """The held-out documents of every part of a prepared corpus."""
    parts = json.loads((data / "corpus.json").read_text())["parts"]
    return {part: json.loads((data / f"{part}.held.json").read_text()) for part in parts}


def table(reports: dict[str, Report]) -> str:
    """Markdown: a row a part, the files side by side."""
    names = list(reports)
    lines = ["| held-out text | characters | " + " | ".join(f"{n}: bits/char (perplexity)" for n in names) + " |"]
    lines.append("|---|---" + "|---" * len(names) + "|")
    for part in next(iter(reports.values())).parts:
        cells = [f"{reports[n].parts[part].bits_per_char:.3f} ({reports[n].parts[part].perplexity:.1f})" for n in names]
        lines.append(f"| {part} | {reports[names[0]].parts[part].chars} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--against", type=Path, help="another qwen3moe file, measured on the same text")
    parser.add_argument("--max_chars", type=int, default=60_000, help="of each part (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    texts = held_out_texts(arguments.data)
    reports = {p.stem: measure(p, texts, arguments.max_chars) for p in (arguments.model, arguments.against) if p}
    print(table(reports))
    for name, report in reports.items():
        entropies = ", ".join(f"{value:.3f}" for value in report.entropies())
        print(f"{name}: utilisation entropy / ln E per layer {entropies}; experts never used: {report.num_dead()}")


if __name__ == "__main__":
    main()
