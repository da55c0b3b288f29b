"""Begins a smaller model from a trained one: some of its layers, and in them the experts used most.

    python -m tools.embedded_model.shrink --checkpoint .cache/train/last.pt --data .cache/corpus --out .cache/tiny

What it writes is a checkpoint to go on training from with ``train.py --shape '{"num_layers": 3, "num_experts": 8}'``:
alone it answers nonsense, after a few minutes it has found its way again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from .data import DEFAULT_MIX, Corpus
from .model import Model
from .shared_state import SharedState, load_model


@torch.no_grad()
def shrink(large: Model, layers: list[int], num_experts: int, tokens: torch.Tensor) -> Model:
    """A model of ``layers`` with the ``num_experts`` that ``tokens`` [B, T] are routed to most often in each."""
    large(tokens)
    small = Model(replace(large.shape, num_layers=len(layers), num_experts=num_experts))
    small.embedding.load_state_dict(large.embedding.state_dict())
    small.norm.load_state_dict(large.norm.state_dict())
    for block, number in zip(small.blocks, layers, strict=True):
        origin = large.blocks[number]
        chosen = origin.moe.load.topk(num_experts).indices
        state = origin.state_dict()
        for name in ("moe.router.weight", "moe.gate_up", "moe.down"):
            state[name] = state[name][chosen]
        block.load_state_dict(state)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="directory for the new checkpoint")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--num_experts", type=int, default=8)
    arguments = parser.parse_args()
    tokens = Corpus(arguments.data).batch(DEFAULT_MIX, 16, 256, seed=(0, 0))
    small = shrink(load_model(arguments.checkpoint), arguments.layers, arguments.num_experts, tokens)
    arguments.out.mkdir(parents=True, exist_ok=True)
    SharedState(small, 1).save(arguments.out / "last.pt", {})
    print(f"{arguments.out / 'last.pt'}: {sum(p.numel() for p in small.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
