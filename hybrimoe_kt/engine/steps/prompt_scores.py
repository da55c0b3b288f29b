"""Log-probabilities of a prompt's own tokens, gathered while the prompt is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrimoe_kt.engine.sampler import Sampled
from hybrimoe_kt.errors import KernelError

__all__ = ["PromptScores"]

# Logits of one piece, in elements: 256 MiB of float32, and the vocabularies that are largest still get 260 tokens.
_MAX_LOGITS = 2**26


class PromptScores:
    """Takes the logits of a prompt piece by piece and keeps of them what was asked for."""

    def __init__(self, prompt: Sequence[int], num_likeliest: int) -> None:
        self._prompt, self._num_likeliest = prompt, num_likeliest
        self._sampled: list[Sampled] = []
        self.clear()

    def clear(self) -> None:
        """Begin anew at the prompt's first token, of which no logits tell."""
        self._sampled = [Sampled(self._prompt[0], place="prompt")]

    @staticmethod
    def max_tokens(vocab: int) -> int:
        """Longest piece whose logits `[num_tokens, vocab]` are to lie in memory at once."""
        return max(1, _MAX_LOGITS // vocab)

    def add(self, logits: torch.Tensor) -> None:
        """Take the next piece's `logits [num_tokens, vocab]`, any dtype and device; each row tells of the token after.

        KernelError where they are not finite.
        """
        at = len(self._sampled)
        wanted = list(self._prompt[at : at + len(logits)])
        if not wanted:
            return
        rows = logits[: len(wanted)].float()
        total = rows.logsumexp(-1, keepdim=True)
        if not total.isfinite().all():
            raise KernelError("the model produced NaN or infinite logits; the weights or a backend are broken")
        targets = torch.tensor(wanted, device=rows.device)[:, None]
        own = (rows.gather(-1, targets) - total)[:, 0].tolist()
        best = rows.topk(min(self._num_likeliest, rows.shape[-1]))
        values, tokens = (best.values - total).tolist(), best.indices.tolist()
        self._sampled += [
            Sampled(token, logprob, tuple(zip(tokens[row], values[row], strict=True)), "prompt")
            for row, (token, logprob) in enumerate(zip(wanted, own, strict=True))
        ]

    def sampled(self) -> list[Sampled]:
        """Every token of the prompt; all of it must have been read."""
        assert len(self._sampled) == len(self._prompt), f"{len(self._sampled)} of {len(self._prompt)} tokens were read"
        return self._sampled
