"""What attention is asked, for one token or for a prompt's, and what answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Asked", "AskedPrompt", "Attention", "PromptReader"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One token's attention to two rooms `[1, kv_heads, capacity, width]`, kept in any one dtype.

    These are keys and values, for grouped queries; with a rotated query they are latents, which are values, too, and
    their rotated part, for one head of keys.
    """

    query: torch.Tensor
    """`[1, heads, 1, width]`; answers have its dtype, to which what is kept is rounded."""
    keys: torch.Tensor
    values: torch.Tensor
    length: torch.Tensor
    """Int64 `[1]`, at least 1: how many tokens in front are held. It may differ at a replay."""
    scaling: float
    window: int = 0
    """The last ones, so many, are seen, 0: all."""
    sinks: torch.Tensor | None = None
    """`[heads]`, scores of nothing."""
    rotated_query: torch.Tensor | None = None
    """`[1, heads, 1, rope]`."""

    @property
    def is_latent(self) -> bool:
        return self.rotated_query is not None


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """Attention of the last tokens of `[1, kv_heads, length, width]`, each to itself and all before it; as `Asked`."""

    query: torch.Tensor
    """`[1, heads, tokens, width]`."""
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    window: int = 0
    sinks: torch.Tensor | None = None
    rotated_query: torch.Tensor | None = None
    """`[1, heads, tokens, rope]`."""

    @property
    def is_latent(self) -> bool:
        return self.rotated_query is not None


class PromptReader(Protocol):
    """One way of attending to a prompt without a mask."""

    name: str

    def refuses(self, asked: AskedPrompt) -> str | None:
        """Why it does not do so, None if it does."""

    def attend(self, asked: AskedPrompt) -> torch.Tensor:
        """Return `[1, heads, tokens, width]`, of values, or of latents."""


class Attention(Protocol):
    """One way of attending, made with the device it is for."""

    name: str

    def __init__(self, device: torch.device) -> None: ...

    def refuses(self, asked: Asked) -> str | None:
        """Why it does not do so, None if it does."""

    def plan(self, length: int) -> None:
        """Prepare on the host for the step that follows, or its replay, in which so many tokens are held."""

    def attend(self, asked: Asked) -> torch.Tensor:
        """Return `[1, heads, 1, width]`, of values, or of latents."""
