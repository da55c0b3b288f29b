"""Parameters, gradients and AdamW's moments in memory that all workers share; each updates its own slice."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from .model import Model, Shape

BETA_1, BETA_2, EPSILON, DECAY, MAX_NORM = 0.9, 0.98, 1e-9, 0.05, 1.0
CHUNK = 1 << 18  # elements: small enough that the passes of one update stay in a core's cache


class SharedState:
    """Everything a checkpoint holds. Matrices come first in the flat order: only they decay."""

    def __init__(self, model: Model, num_workers: int) -> None:
        self.shape, self.num_workers = model.shape, num_workers
        named = sorted(model.named_parameters(), key=lambda item: not _decays(*item))
        self.layout = [(name, parameter.shape) for name, parameter in named]
        self.flat = torch.cat([p.detach().flatten() for _, p in named]).share_memory_()
        self.num_decaying = sum(p.numel() for n, p in named if _decays(n, p))
        self.first, self.second = (torch.zeros_like(self.flat).share_memory_() for _ in range(2))
        self.gradients = [torch.zeros_like(self.flat).share_memory_() for _ in range(num_workers)]
        self.squares = torch.zeros(num_workers, dtype=torch.float64).share_memory_()
        self.counters = torch.zeros(3, dtype=torch.float64).share_memory_()  # steps, tokens, seconds

    step = property(lambda self: int(self.counters[0]))
    seen = property(lambda self: int(self.counters[1]))
    spent = property(lambda self: float(self.counters[2]))

    def adopt(self, model: Model, worker: int) -> None:
        """Let the model's parameters be views of the shared ones, and its gradients of this worker's."""
        parameters, start = dict(model.named_parameters()), 0
        for name, shape in self.layout:
            end = start + shape.numel()
            parameters[name].data = self.flat[start:end].view(shape)
            parameters[name].grad = self.gradients[worker][start:end].view(shape)
            start = end

    def advance(self, tokens: int, seconds: float) -> None:
        self.counters += torch.tensor([1, tokens, seconds], dtype=torch.float64)

    def gather(self, worker: int) -> None:
        """Sum all workers' gradients over this worker's slice, into its own buffer; leave the squared norm."""
        self.squares[worker] = 0
        for part in self._chunks(worker):
            total = self.gradients[worker][part]
            for other in range(self.num_workers):
                if other != worker:
                    total += self.gradients[other][part]
            total /= self.num_workers
            self.squares[worker] += total.square().sum()

    def update(self, worker: int, learning_rate: float) -> None:
        """AdamW on this worker's slice; afterwards its gradients are zero everywhere it may write to."""
        scale = min(1.0, MAX_NORM / (float(self.squares.sum()) ** 0.5 + 1e-6))
        step = self.step + 1
        rate = learning_rate * (1 - BETA_2**step) ** 0.5 / (1 - BETA_1**step)
        for part in self._chunks(worker):
            gradient = self.gradients[worker][part].mul_(scale)
            first, second, values = self.first[part], self.second[part], self.flat[part]
            first.lerp_(gradient, 1 - BETA_1)
            second.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
            decaying = max(0, min(part.stop, self.num_decaying) - part.start)
            values[:decaying].mul_(1 - learning_rate * DECAY)
            values.addcdiv_(first, second.sqrt().add_(EPSILON), value=-rate)
            for buffer in self.gradients:
                buffer[part].zero_()

    def save(self, path: Path, arguments: dict[str, str]) -> None:
        """Write a checkpoint so that a kill at any moment leaves the old or the new one."""
        partial = path.with_suffix(".partial")
        torch.save({"flat": self.flat, "first": self.first, "second": self.second, "counters": self.counters,
                    "shape": self.shape.as_dict(), "arguments": arguments}, partial)  # fmt: skip
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint was written."""
        stored = torch.load(path)
        if Shape(**stored["shape"]) != self.shape:
            raise SystemExit(f"{path} holds {stored['shape']}, asked for was {self.shape.as_dict()}.")
        for name in ("flat", "first", "second", "counters"):
            getattr(self, name).copy_(stored[name])

    def _chunks(self, worker: int) -> list[slice]:
        size = self.flat.numel()
        low, high = size * worker // self.num_workers, size * (worker + 1) // self.num_workers
        return [slice(i, min(i + CHUNK, high)) for i in range(low, high, CHUNK)]


def load_model(path: Path) -> Model:
    """The model of a checkpoint, for evaluation."""
    stored = torch.load(path)
    state = SharedState(Model(Shape(**stored["shape"])), 1)
    state.load(path)
    model = Model(state.shape)
    state.adopt(model, 0)
    return model.requires_grad_(False).eval()


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and "embedding" not in name
