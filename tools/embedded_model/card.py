"""Rewrites the measured parts of the model card: perplexity by part, use of the experts, samples.

    python -m tools.embedded_model.card --data .cache/corpus --against tiny-qwen3moe-q4_k.gguf

Each part lies between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in hybrimoe_kt/models/README.md; the rest is by hand.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.models import embedded_model, tiny_model

from .evaluate import held_out_texts, measure, table
from .samples import markdown

CARD = Path("hybrimoe_kt/models/README.md")


def replaced(card: str, name: str, text: str) -> str:
    """``card`` with ``text`` in its part ``name``; SystemExit where the card has no such part."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(card):
        raise SystemExit(f"{CARD} has no part <!-- {name} --> ... <!-- /{name} -->.")
    return pattern.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--against", type=Path, help="an earlier qwen3moe file to measure on the same text")
    parser.add_argument("--unquantised", type=Path, help="the same model exported with --f32: what quantisation costs")
    parser.add_argument("--max_chars", type=int, default=60_000, help="of each part (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    texts = held_out_texts(arguments.data)
    files = {
        "this": embedded_model(),
        "unquantised": arguments.unquantised,
        "tiny": tiny_model(),
        "prototype": arguments.against,
    }
    reports = {name: measure(path, texts, arguments.max_chars) for name, path in files.items() if path}
    lines = ["| | utilisation entropy / ln E, by layer | experts never used |", "|---|---|---|"]
    for name, report in reports.items():
        entropies = ", ".join(f"{value:.3f}" for value in report.entropies())
        lines.append(f"| {name} | {entropies} | {report.num_dead()} |")
    card = replaced(CARD.read_text(encoding="utf-8"), "evaluation", table(reports))
    card = replaced(card, "utilisation", "\n".join(lines))
    card = replaced(card, "samples", markdown(build_engine(embedded_model(), progress=False)))
    CARD.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
