"""Between a command and the terminal it was typed in: its arguments, files and streams, and Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hybrimoe_kt.errors import ConfigError, nearest

__all__ = [
    "INTERRUPTED",
    "Abandoned",
    "Parser",
    "check_writable",
    "discard_output",
    "interrupt_sets",
    "number",
    "prepare_streams",
    "read_text",
    "whole",
]

INTERRUPTED = 130
"""What a shell reports for a program ended by Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong without the whole usage, and names the nearest flag when one is unknown."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in _flags(self) if flag.startswith("--")]
            self.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags) or '; see --help'}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every flag of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _flags(inner)


def whole(low: int, high: int | None = None) -> Any:
    """Return what converts an argument to a whole number within limits, and refuses any other."""
    wanted = f"of at least {low}" if high is None else f"from {low} to {high}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {wanted}")
        return value

    return convert


def number(low: float, high: float) -> Any:
    """Return what converts an argument to a number within limits, and refuses any other."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value

    return convert


def read_text(file: Path, flag: str) -> str:
    """Return the file's text; ConfigError where it is not UTF-8 or cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{file}: {reason}; {flag} takes a text file") from None


def check_writable(file: Path | None, flag: str) -> None:
    """Raise ConfigError naming `flag` if `file` cannot be written; leaves no trace of having tried."""
    if file is None:
        return
    try:
        is_new = not file.exists()
        with file.open("ab"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{flag} {file}: cannot be written there ({reason})") from None
    if is_new:
        with contextlib.suppress(OSError):
            file.unlink()


def discard_output() -> None:
    """Send what is still to be written nowhere, or the interpreter complains about it at exit."""
    with contextlib.suppress(OSError, AttributeError):  # no file behind standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Make the standard streams safe to write to, whatever our starter did.

    A closed one gets the null device, which also keeps its number from other files. One of a code page, as a pipe has
    on Windows, gets a question mark where it lacks a character, instead of a traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


class Abandoned(Exception):
    """The user insisted on leaving in the middle of a step."""


@contextlib.contextmanager
def interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set `stop` instead of raising; the third press leaves the program.

    The engine looks at `stop` between tokens. Outside the main thread, where no signal arrives, nothing changes.
    """
    presses = 0

    def on_interrupt(signal_number: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        if presses == 2:
            os.write(2, b"\r\nfinishing the current step; Ctrl-C once more leaves the program\r\n")
        if presses > 2:
            raise Abandoned
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
