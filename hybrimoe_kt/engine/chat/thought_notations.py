"""How model families write thoughts, and what stands around the content of their answers.

A chat template means what its marks say. Patterns are of the `regex` module, as in Transformers' response templates.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["THOUGHTS", "WRAPPINGS", "ThoughtNotation", "thoughts_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtNotation:
    """Thoughts between two marks, at the beginning of an answer unless `opens_anywhere`."""

    open: str
    close: str
    opens_anywhere: bool = False
    dropped: str = ""
    """Pattern of what else is no content."""
    tokens: tuple[str, ...] = ()
    """Texts of further tokens that `dropped` needs to see."""
    turn: str = ""
    """What stands after thoughts before anything else does."""
    content: str = ""
    """What stands before the content."""
    json_content: str = ""
    """The same where the content is JSON."""


_THINK = ThoughtNotation(open="<think>", close="</think>")
THOUGHTS: dict[str, ThoughtNotation] = {
    "<|channel|>": ThoughtNotation(
        open="<|channel|>analysis<|message|>",
        close="<|end|>",
        opens_anywhere=True,
        dropped=r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)\s*(?:<\|constrain\|>)?\w*<\|message\|>"
        r"|<\|(?:end|return)\|>|<\|start\|>assistant(?=<\|channel\|>(?:analysis|final|commentary)\s*<\|message\|>)",
        tokens=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>"),
        turn="<|start|>assistant",
        content="<|channel|>final<|message|>",
        json_content="<|channel|>final <|constrain|>json<|message|>",
    ),
    "<|channel>": ThoughtNotation(
        open="<|channel>thought\n", close="<channel|>", opens_anywhere=True, tokens=("<|channel>", "<channel|>")
    ),
    "<|begin|>assistant<|think|>": ThoughtNotation(
        open="<|think|>",
        close="<|end|>",
        dropped=r"(?:<\|begin\|>assistant)?<\|content\|>|<\|begin\|>assistant(?=<\|tool_calls)|<\|end\|>",
        tokens=("<|begin|>", "<|content|>"),
        turn="<|begin|>assistant",
        content="<|content|>",
    ),
    "<mm:think>": ThoughtNotation(open="<mm:think>", close="</mm:think>"),
    "<seed:think>": ThoughtNotation(open="<seed:think>", close="</seed:think>"),
    "[THINK]": ThoughtNotation(open="[THINK]", close="[/THINK]"),
    "<|START_THINKING|>": ThoughtNotation(open="<|START_THINKING|>", close="<|END_THINKING|>"),
    "<thought>": ThoughtNotation(open="<thought>", close="</thought>"),
    "<think>": _THINK,
    "</think>": _THINK,
}
"""By the mark in a chat template that means it."""

WRAPPINGS = (
    ("<response>", "</response>"),
    ("<answer>", "</answer>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|START_TEXT|>", "<|END_TEXT|>"),
)
"""What stands around the content of an answer, where a chat template has both."""


def thoughts_of(template: str, special: Collection[str] = ()) -> ThoughtNotation | None:
    """Return the notation of thoughts that a chat template shows, else one whose mark is among the `special` tokens."""
    for mark, notation in THOUGHTS.items():
        if mark in template:
            return notation
    return _THINK if _THINK.open in special else None
