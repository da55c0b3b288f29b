"""Command lines that are refused in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NoReturn

from hybrimoe_kt.errors import nearest

__all__ = ["Parser", "number", "whole"]


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
