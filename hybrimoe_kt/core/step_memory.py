"""What one step of a model takes of a card while it runs: an upper bound from the widths of its layers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCORE_BYTES", "StepShape", "score_bytes"]

SCORE_BYTES = 256 * 2**20
"""Latent attention computes so many queries at a time that their scores take no more. A choice: little of a card."""
_COPIES = 3
"""Of what attention projects, alive at once: as projected, with rotated parts, and laid out for the product."""
_LINEAR_COPIES = 8
"""float32 tensors of linear attention's widths alive at once: query, key and value, the latter two times beta, padded,
the decayed key, and the answer."""


def score_bytes(value_bytes: int) -> int:
    """Bytes alive for each score of latent attention, of numbers of `value_bytes`.

    Either two products and their sum, or scores, masked scores, float32 probabilities and these rounded.
    """
    return max(3 * value_bytes, 2 * value_bytes + 4 + (value_bytes if value_bytes < 4 else 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Widths of the model's widest layer of each kind, in numbers a token unless said otherwise.

    Layers run one after another, so that the largest counts once.
    """

    chunk_tokens: int
    """Longest piece of a prompt."""
    value_bytes: int
    """Of a number of the model's dtype."""
    hidden: int
    vocabulary: int
    projected: int = 0
    """Queries, keys, values, and what latent attention makes of them."""
    repeated: int = 0
    """Keys and values repeated for every query's head, a token of the context."""
    scores: int = 0
    """Scores that are written to memory, for a token and a token of the context; 0 where a kernel keeps them."""
    handed_out: int = 0
    """Keys and values converted from another type than the model's, a token of the context."""
    feed_forward: int = 0
    linear: int = 0
    """Of linear attention, over all heads."""
    linear_heads: int = 0

    def num_bytes(self, context_tokens: int) -> int:
        """The most that is alive at once in a step that ends a context of so many tokens."""
        tokens, value = min(self.chunk_tokens, context_tokens), self.value_bytes
        states = tokens * self.hidden * (4 * value + 2 * 4)  # residual, normed, two answers; a norm's float32
        mask = tokens * context_tokens * (2 + value)  # as truth values twice, and as what is added
        scores = min(tokens * self.scores * context_tokens * score_bytes(value), self._score_limit(context_tokens))
        attention = _COPIES * tokens * self.projected * value + mask + scores
        attention += context_tokens * (self.repeated + self.handed_out) * value
        feed_forward = 3 * tokens * self.feed_forward * value
        linear = 4 * tokens * (_LINEAR_COPIES * self.linear + 3 * 64 * self.linear_heads)  # and 64 x 64 of each piece
        logits = self.vocabulary * (value + 4)
        return states + max(attention, feed_forward, linear) + logits

    def _score_limit(self, context_tokens: int) -> int:
        """At least one token's are computed at a time."""
        return max(SCORE_BYTES, self.scores * context_tokens * score_bytes(self.value_bytes))
