"""What a caller may say about how tokens are chosen; plain data, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrimoe_kt.errors import ConfigError

from .constraint import Constraint

__all__ = ["Sampling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest and ignores `top_p`, `top_k`, `min_p`, `seed`.

    ConfigError for a value outside its range.
    """

    max_new_tokens: int = 256
    """Longest answer, tokens; the context may end it sooner. 0 reads the prompt and answers nothing."""
    temperature: float = 0.7
    """Divides the logits; 0 or more."""
    top_p: float = 0.95
    """Only the likeliest tokens that have this probability together, 0 to 1; 0 leaves the likeliest one."""
    top_k: int = 0
    """Only so many likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability, 0 to 1."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens met in prompt or answer (multiplies negative ones); above 0."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time the answer has it."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens that the answer has."""
    penalty_window: int | None = None
    """All three penalties count the last so many tokens of prompt and answer; None: each what is said above."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    seed: int | None = None
    """The same seed draws the same tokens; None or below 0: another one every time."""
    ignore_end: bool = False
    """Never draw a token that ends the answer."""
    constraint: Constraint | None = None
    """The form of the answer's content. It ends where nothing can be added, also with `ignore_end`."""
    num_logprobs: int | None = None
    """Log-probabilities of the drawn token and of so many likeliest ones; None: none at all."""
    num_prompt_logprobs: int | None = None
    """The same of the prompt's own tokens, which computes all of the prompt anew, and of the token that ended it."""

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, "0 or more", self.max_new_tokens >= 0)
        _check("temperature", self.temperature, "0 or more", self.temperature >= 0)
        _check("top_p", self.top_p, "from 0 to 1", 0 <= self.top_p <= 1)
        _check("top_k", self.top_k, "0 (all) or more", self.top_k >= 0)
        _check("min_p", self.min_p, "from 0 to 1", 0 <= self.min_p <= 1)
        _check("repetition_penalty", self.repetition_penalty, "above 0", self.repetition_penalty > 0)
        for name in ("penalty_window", "num_logprobs", "num_prompt_logprobs"):
            value = getattr(self, name)
            _check(name, value, "0 or more, or None", value is None or value >= 0)


def _check(name: str, value: float | None, valid: str, is_valid: bool) -> None:
    if not is_valid:
        raise ConfigError(f"{name} is {value!r}, valid: {valid}")
