"""Interactive chat on a terminal."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrimoe_kt.errors import CapacityError, HybriMoEError, nearest

from .chat_output import StreamPrinter, summary_line, visible
from .chat_statistics import answer_rows, total_rows
from .options import SamplingOptions, sampling_of
from .terminal import INTERRUPTED, Abandoned, interrupt_sets

if TYPE_CHECKING:
    from hybrimoe_kt.engine.sampling import Sampling

__all__ = ["ChatEngine", "run_chat"]

HELP = """\
Type a message and press Enter.

  /reset   start a new conversation
  /stats   numbers of the last answer and since the start
  /help    this text
  /exit    leave (also /quit or Ctrl-D)

Several lines:  end a line with \\ to go on in the next, or put the text between
                \"\"\" and \"\"\". Pasted text keeps its lines.
Keys:           Up and Down for earlier messages. Ctrl-C stops an answer (what
                was said stays in the conversation) or clears what is typed."""
COMMANDS = ("/reset", "/stats", "/help", "/exit", "/quit")


class ChatEngine(Protocol):
    """What a chat needs of a loaded model."""

    model_name: str

    def stream(
        self,
        messages: list[dict[str, str]],
        *,
        sampling: Sampling,
        stop: threading.Event,
        as_written: bool,
    ) -> Iterator[str]:
        """Yield the answer in pieces until done or `stop` is set; CapacityError when the context overflows."""

    def last_run(self) -> dict[str, Any]:
        """Return the numbers of the last answer."""

    def statistics(self) -> dict[str, Any]:
        """Return the numbers since the model was loaded."""


class MessageSource(Protocol):
    """Where messages come from: a `MessagePrompt`, or a list in tests."""

    def read(self) -> str:
        """Return the next message; EOFError at the end, KeyboardInterrupt on Ctrl-C."""


def run_chat(
    engine: ChatEngine,
    options: SamplingOptions,
    console: Console,
    *,
    messages: MessageSource | None = None,
    after_answer: Callable[[dict[str, Any], str], None] | None = None,
) -> int:
    """Talk until the user leaves, and return the exit code; `after_answer` gets each answer's numbers and text."""
    if messages is None:
        from .chat_input import MessagePrompt

        messages = MessagePrompt()
    if isinstance(console.file, io.TextIOWrapper):  # a terminal that is not UTF-8 shows "?" rather than a traceback
        console.file.reconfigure(errors="replace")
    chat = _Chat(engine, options, console, after_answer)
    name = visible(engine.model_name)
    console.print(f"{name}: type a message, /help for help, Ctrl-D to leave", style="dim", markup=False)
    try:
        while chat.handle(messages):
            pass
    except Abandoned:
        return INTERRUPTED
    return 0


class _Chat:
    def __init__(
        self,
        engine: ChatEngine,
        options: SamplingOptions,
        console: Console,
        after_answer: Callable[[dict[str, Any], str], None] | None,
    ) -> None:
        self.engine, self.options, self.console, self.after_answer = engine, options, console, after_answer
        self.conversation: list[dict[str, str]] = []

    def handle(self, messages: MessageSource) -> bool:
        """Read one message and act on it; False when the user leaves."""
        try:
            message = messages.read()
        except EOFError:
            return False
        except KeyboardInterrupt:
            self.note("Ctrl-D or /exit leaves")
            return True
        if not message:
            return True
        if re.fullmatch(r"/[a-z]*", message.split()[0], re.IGNORECASE):
            return self.command(message.split()[0].lower())
        with contextlib.suppress(KeyboardInterrupt):  # pressed just as the answer ended: not meant for the program
            self.answer(message)
        return True

    def command(self, name: str) -> bool:
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.conversation.clear()
            self.note("new conversation")
        elif name == "/help":
            self.console.print(HELP, markup=False, highlight=False)
        elif name == "/stats":
            self.console.print(_statistics_table(self.engine))
        else:
            self.note(f"unknown command {name}{nearest(name, COMMANDS) or '; /help lists the commands'}")
        return True

    def answer(self, message: str) -> None:
        """Stream one answer; the turn joins the conversation only when something was said."""
        stop = threading.Event()
        turn = [*self.conversation, {"role": "user", "content": message}]
        pieces: list[str] = []
        try:
            with interrupt_sets(stop):
                self.stream(turn, stop, pieces)
        except CapacityError as error:
            self.problem(_with_hint(str(error)))
            return
        except HybriMoEError as error:
            self.problem(f"{error} (this message is forgotten)")
            return
        text = "".join(pieces)
        if text:
            self.conversation = [*turn, {"role": "assistant", "content": text}]
        if stop.is_set():
            self.note("stopped" if text else "stopped before the first word; this message is forgotten")
        elif not text:
            self.note("the model said nothing; this message is forgotten")
        run = self.engine.last_run()
        self.note(summary_line(run))
        if self.after_answer is not None:
            self.after_answer(run, text)

    def stream(self, turn: list[dict[str, str]], stop: threading.Event, pieces: list[str]) -> None:
        file = self.console.file
        printer = StreamPrinter(file.write, self.console.width if self.console.is_terminal else None)
        answer = self.engine.stream(turn, sampling=sampling_of(self.options), stop=stop, as_written=True)
        try:
            for piece in answer:
                pieces.append(piece)
                printer.feed(piece)
                file.flush()
        finally:
            if pieces:
                printer.end_line()
                file.flush()
            close = getattr(answer, "close", None)
            if close is not None:
                close()

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def problem(self, text: str) -> None:
        self.console.print(text, style="red", markup=False, highlight=False)


def _with_hint(sentence: str) -> str:
    return sentence if "/reset" in sentence else f"{sentence}; /reset starts a new conversation"


def _statistics_table(engine: ChatEngine) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    answer, total = answer_rows(engine.last_run()), total_rows(engine.statistics())
    for title, rows in (("last answer", answer), ("since the start", total)):
        table.add_row(Text(title, style="bold"), "")
        for name, value in rows:
            table.add_row(Text(f"  {name}"), Text(value))
    return table
