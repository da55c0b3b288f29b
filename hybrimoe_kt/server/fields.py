"""Kinds of values that requests of all interfaces hold, as clients really write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field

__all__ = [
    "Biases", "Finite", "Penalty", "Repetition", "Seed", "Share", "Stop", "Text", "TopK", "Whole", "Window", "by_type",
]  # fmt: skip

Text = Annotated[str, Field(min_length=1)]
Finite = {"allow_inf_nan": False}


def _whole(value: Any) -> Any:
    """Many languages have one kind of number, and write ten as 10.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _by_token(value: Any) -> Any:
    """llama.cpp's clients send pairs of token and bias, where false forbids the token."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return value
    return {str(_whole(token)): -100.0 if bias is False else bias for token, bias in value}


Whole = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]
"""Below 0: another one every time."""
Share = Annotated[float, Field(ge=0, le=1, **Finite)]
"""A part of 1, such as a probability."""
TopK = Annotated[Whole, Field(ge=-1, le=2**31)]
"""0 and -1: all."""
Penalty = Annotated[float, Field(ge=-2, le=2, **Finite)]
Repetition = Annotated[float, Field(gt=0, le=10, **Finite)]
Window = Annotated[Whole, Field(ge=-1, le=2**31)]
"""Tokens; -1: all."""
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100, **Finite)]], BeforeValidator(_by_token)]
Stop = str | Annotated[list[str], Field(max_length=16)]


def by_type(refusal: str, tags: Mapping[str | None, str] | None = None) -> Discriminator:
    """Tell models apart by their `type`, with which they are tagged, if not with another of `tags`.

    `refusal` says what is wrong with all other types; None among `tags` is for a type that is left out.
    """

    def tag(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return (tags or {}).get(kind, kind) if kind is None or isinstance(kind, str) else None

    return Discriminator(tag, custom_error_type="unsupported_type", custom_error_message=refusal)
