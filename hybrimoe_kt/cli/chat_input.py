"""What a user types: one message, over several lines if need be.

Two ways to write several lines (pasted text keeps its lines anyway): a line that ends in a backslash continues on the
next, and a line that begins with three double quotes opens a block that the next three close.
"""

from __future__ import annotations

from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

__all__ = ["MessagePrompt", "is_complete", "message_of"]

QUOTES = '"""'


def is_complete(text: str) -> bool:
    """Tell whether Enter sends `text` rather than starting another line."""
    if text.lstrip().startswith(QUOTES):
        return QUOTES in text.lstrip()[len(QUOTES) :]
    return not text.endswith("\\")


def message_of(text: str) -> str:
    """Return the message that the typed `text` means, without the marks of continuation."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        inside, _, after = stripped[len(QUOTES) :].partition(QUOTES)
        return "\n".join(part.strip("\n") for part in (inside, after.lstrip()) if part.strip())
    return stripped.replace("\\\n", "\n").removesuffix("\\").strip()


class MessagePrompt:
    """Line editor with a history in memory; Up and Down walk through earlier messages."""

    def __init__(self, **session_options: Any) -> None:
        """`session_options` (`input`, `output`) replace the terminal in tests."""
        self._session: PromptSession[str] = PromptSession(
            message=HTML("<ansicyan><b>&gt; </b></ansicyan>"),
            prompt_continuation=lambda width, line, wrapped: ". " if not wrapped else "  ",
            history=InMemoryHistory(),
            multiline=True,
            reserve_space_for_menu=0,
            key_bindings=_keys(),
            enable_open_in_editor=False,
            **session_options,
        )

    def read(self) -> str:
        """Return the next message; EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C in an empty line."""
        text = self._session.prompt()
        # A terminal that claims not to be UTF-8 delivers escaped bytes, which no tokenizer takes.
        return message_of(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_complete(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.cursor_position = len(buffer.text)
            buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys
