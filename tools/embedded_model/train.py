"""Trains the embedded model within a budget of minutes; every checkpoint can be resumed, also after ``kill -9``.

    python -m tools.embedded_model.train --data .cache/corpus --out .cache/train --minutes 80

The learning rate warms up, stays, and falls linearly over the last part of the *budget*, so that a machine shared with
others ends in time whatever its speed. Workers are processes of one thread that share the parameters: on cores that
other programs use, too, that loses less than threads that wait for each other in every matrix product. Batches are a
function of seed and step alone: a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .data import SPECIAL_TOKENS, Corpus, parse_mix
from .model import Model, Shape
from .shared_state import SharedState

log = logging.getLogger("train")
BALANCE_WEIGHT, Z_WEIGHT, USER_WEIGHT = 0.05, 0.0005, 0.3
WARM_UP_STEPS = 100


def keep_memory() -> None:
    """Let glibc keep what it freed: handing 64 MB buffers back and faulting them in anew cost 3/4 of a step."""
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
        mallopt(option, value)


def rate(step: int, spent: float, budget: float, decay: float) -> float:
    """Factor on the learning rate after ``spent`` of ``budget`` seconds, with ``decay`` the share of it that falls."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * min(1.0, max(0.0, 1 - spent / budget) / decay)


def importance(inputs: torch.Tensor) -> torch.Tensor:
    """Weight of each next token, ``inputs`` [B, T]: what a user says is context, hardly to be foretold."""
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    is_mark = inputs < SPECIAL_TOKENS.index("<|end|>")  # a document's end, a user's or an assistant's turn
    last_mark = torch.where(is_mark, positions, 0).cummax(1).values
    speaks = inputs.gather(1, last_mark) == SPECIAL_TOKENS.index("<|user|>")
    return torch.where(speaks, USER_WEIGHT, 1.0)


def loss_of(model: Model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Training loss and the weighted cross entropy alone, of ``tokens`` [B, T + 1]."""
    logits, weights = model(tokens[:, :-1]), importance(tokens[:, :-1]).flatten()
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    plain = (each * weights).sum() / weights.sum()
    balance, z = model.auxiliary_losses()
    return plain + BALANCE_WEIGHT * balance + Z_WEIGHT * z, plain


@torch.no_grad()
def validate(model: Model, corpus: Corpus, length: int, rows: int = 12) -> dict[str, float]:
    """Bits per character of each part's held-out text (its first rows), and the worst layer's utilisation entropy."""
    found: dict[str, float] = {}
    for part in corpus.parts:
        tokens, chars = corpus.held_out(part, rows, length)
        logits = model(tokens[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        found[part] = round(float(nats.item() / chars / np.log(2)), 3)
    loads = torch.stack([block.moe.load for block in model.blocks])
    entropy = -(loads * loads.clamp_min(1e-9).log()).sum(1) / np.log(loads.shape[1])
    return found | {"least entropy": round(entropy.min().item(), 3)}


def train(worker: int, arguments: argparse.Namespace, state: SharedState, barrier: Barrier) -> None:
    """One worker's loop: gradients of its rows, then the update of its share of the parameters."""
    keep_memory()
    torch.set_num_threads(1)
    level = logging.INFO if worker == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    corpus = Corpus(arguments.data)
    model = Model(state.shape)
    state.adopt(model, worker)
    mix, budget, rows = parse_mix(arguments.mix), arguments.minutes * 60, arguments.rows // state.num_workers
    average, last, saved, judged, parent = None, time.monotonic(), state.spent, -1e9, os.getppid()
    barrier.wait()
    while state.spent < budget:
        if os.getppid() != parent:  # killed: a resumed run must not find these workers still writing
            barrier.abort()
            raise SystemExit("the process that started this worker is gone")
        factor = rate(state.step, state.spent, budget, arguments.decay)
        tokens = corpus.batch(mix, rows, arguments.length, seed=(arguments.seed, state.step, worker))
        loss, plain = loss_of(model, tokens)
        loss.backward()
        barrier.wait()
        state.gather(worker)
        barrier.wait()
        state.update(worker, arguments.learning_rate * factor)
        if worker == 0:
            now = time.monotonic()
            state.advance(arguments.rows * arguments.length, now - last)
            last = now
            average = plain.item() if average is None else 0.98 * average + 0.02 * plain.item()
            if state.step % 20 == 0:
                done = (state.step, state.seen / 1e6, state.spent / 60, average, factor)
                log.info("step %d  %.2f M  %.1f min  loss %.3f  rate %.2f", *done)
        barrier.wait()
        if worker == 0 and (state.spent - saved > arguments.save_minutes * 60 or state.spent >= budget):
            state.save(arguments.out / "last.pt", {k: str(v) for k, v in vars(arguments).items()})
            saved = state.spent
        if worker == 0 and (state.spent - judged > arguments.judge_minutes * 60 or state.spent >= budget):
            log.info("held out: %s", validate(model, corpus, arguments.length))
            judged = state.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the checkpoint; an existing one is resumed"
    )
    parser.add_argument("--minutes", type=float, required=True, help="budget, counted over all resumed runs")
    parser.add_argument("--mix", default="", help="part=weight,... (default: what prepare.py suggests)")
    parser.add_argument("--shape", default="{}", help='JSON over the default shape, as {"num_layers": 2}')
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--decay", type=float, default=0.35, help="share of the budget over which the rate falls to zero"
    )
    parser.add_argument("--rows", type=int, default=16, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--save_minutes", type=float, default=3)
    parser.add_argument("--judge_minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    shape = replace(Shape(), vocab_size=Corpus(arguments.data).vocab_size, **json.loads(arguments.shape))
    state = SharedState(Model(shape), arguments.workers)
    if (arguments.out / "last.pt").exists():
        state.load(arguments.out / "last.pt")
        print(f"resumed at step {state.step}, {state.seen / 1e6:.1f} M tokens, {state.spent / 60:.1f} min")
    context = torch.multiprocessing.get_context("spawn")
    torch.multiprocessing.spawn(
        train, (arguments, state, context.Barrier(arguments.workers, timeout=1800)), arguments.workers
    )


if __name__ == "__main__":
    main()
