"""Command lines that are refused in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NoReturn

from hybrimoe_kt.errors import nearest

__all__ = ["Parser"]


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
