"""Which tokens may come next in an answer that is held to a form: constraints, compiled for one vocabulary."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch

from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.engine.text.token_bytes import TokenBytes
from hybrimoe_kt.errors import ConfigError

__all__ = ["TokenMatcher", "TokenMatchers"]

logger = logging.getLogger(__name__)

# What a byte of a mask adds to the scores of its eight tokens, lowest bit first. Of 152,000 tokens on one thread that
# takes 0.09 ms, torch.where with eight times as many booleans 0.65 ms.
_ADDED = torch.tensor([[0.0 if byte >> bit & 1 else -torch.inf for bit in range(8)] for byte in range(256)])
_KEPT = 32
_NEEDED = "answers are held to a form by the llguidance library; install it: pip install 'llguidance>=1.9,<2'"


class TokenMatchers:
    """Makes matchers for one vocabulary. May be asked by several threads; what was compiled last is kept.

    The first one takes longer: all tokens' bytes are put into a tree, 150,000 in 0.6 s.
    """

    def __init__(self, size: int, bytes_of: TokenBytes, end_ids: Collection[int]) -> None:
        """`size` token ids with their bytes; `end_ids` end an answer, and special ones are no part of a text."""
        self._size, self._bytes_of = size, bytes_of
        self._end_ids = sorted(token for token in end_ids if token < size)
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._tree: Any = None
        self._lock = threading.Lock()

    def __call__(self, constraint: Constraint) -> TokenMatcher:
        """Return a matcher at the beginning; ConfigError for a constraint that cannot be followed, with the reason."""
        try:
            import llguidance
        except ImportError:
            raise ConfigError(_NEEDED) from None
        with self._lock:
            definition = constraint.definition()
            if definition not in self._compiled:
                if self._tree is None:
                    self._tree = self._made_tree(llguidance)
                self._compiled[definition] = _compiled(llguidance, self._tree, definition, constraint.kind)
            self._compiled.move_to_end(definition)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return TokenMatcher(self._compiled[definition].deep_copy(), self._size, self._end_ids)

    def _made_tree(self, llguidance: Any) -> Any:
        began = time.perf_counter()
        tokens = _Tokens(self._size, self._bytes_of, self._end_ids)
        tree = llguidance.LLTokenizer(tokens, eos_token=self._end_ids)
        logger.debug("the tree of %d tokens took %.2f s", self._size, time.perf_counter() - began)
        return tree


class _Tokens:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, size: int, bytes_of: TokenBytes, end_ids: list[int]) -> None:
        if not end_ids:
            raise ConfigError("answers of a model without an end token cannot be held to a form")
        self.eos_token_id = end_ids[0]
        self.tokens = [bytes_of(token) for token in range(size)]
        special = {token for token in range(size) if bytes_of.is_special(token)}.union(end_ids)
        self.special_token_ids = [token for token in sorted(special) if self.tokens[token]]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("forced texts are not cut into tokens")


class TokenMatcher:
    """Where one answer stands in its form. Not for several threads at once."""

    def __init__(self, matcher: Any, size: int, end_ids: list[int]) -> None:
        """`matcher` is llguidance's own, at the beginning of an answer."""
        self._matcher = matcher
        self._bytes = torch.zeros(-(-size // 32) * 4, dtype=torch.uint8)
        self._end_ids = end_ids

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete and nothing can be added to it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def end_id(self) -> int:
        """A token that ends an answer."""
        return self._end_ids[0]

    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores [vocab]`, float32 on the CPU, with minus infinity for tokens that may not come next.

        End tokens may come where the answer is complete. ConfigError where a grammar has become too large to follow.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bytes.data_ptr(), len(self._bytes))
        if self._matcher.is_error():
            raise ConfigError(f"the answer's form cannot be followed any further: {_reason(self._matcher)}")
        masked = _ADDED.index_select(0, self._bytes.int()).flatten()[: len(scores)]
        if len(masked) < len(scores):
            masked = torch.nn.functional.pad(masked, (0, len(scores) - len(masked)), value=-torch.inf)
        return masked.add_(scores)

    def accept(self, token: int) -> None:
        """Go on by a token that may come next."""
        if not self._matcher.consume_token(token):
            raise ConfigError(f"the answer's form cannot be followed any further: {_reason(self._matcher)}")


def _compiled(llguidance: Any, tree: Any, definition: str, kind: str) -> Any:
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(tree, definition, log_level=0, limits=limits)
    if not matcher.is_error():
        probe = matcher.deep_copy()
        probe.compute_bitmask()  # an error where nothing may come first
        if not probe.is_error():
            return matcher
        matcher = probe
    what = "form" if kind == "whole" else kind
    raise ConfigError(f"the {what} cannot be followed: {_reason(matcher)}")


_PLACE = re.compile(r"\A(?:.*\n)*?at \d+\(\d+\): (?:failed to (?:compile|parse) [^:]*: )?")


def _reason(matcher: Any) -> str:
    """The library's own, without the grammar that it repeats."""
    said = _PLACE.sub("", str(matcher.get_error()))
    if said.startswith("NoExtension"):
        return "nothing satisfies it"
    lines = [line for line in said.splitlines() if line.strip() and not re.match(r"\s+\d* *[|^]|\s+\S?\^", line)]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["too complex"])[0].strip()[:300]
