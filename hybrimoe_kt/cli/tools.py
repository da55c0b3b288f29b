"""The `hybrimoe` command: dispatches to one module per subcommand."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybrimoe_kt import __version__
from hybrimoe_kt.errors import HybriMoEError, unknown_name


class Command(NamedTuple):
    """Where a subcommand lives; its module has `main(arguments) -> int | None` and is imported when called."""

    module: str
    summary: str


COMMANDS: Mapping[str, Command] = {
    "simulate": Command("hybrimoe_kt.cli.simulate", "replay routing on a simulated machine: times, hit rates"),
    "rules": Command("hybrimoe_kt.cli.rules", "see what a rule file does to a model"),
    "plot": Command("hybrimoe_kt.cli.plot", "draw speed-ups, hit rates or a timeline as PNG or SVG"),
}
USAGE_ERROR = 2
INTERRUPTED = 130


def usage() -> str:
    """Return the text of `hybrimoe --help`."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    head = [
        "usage: hybrimoe COMMAND [OPTIONS]",
        "",
        "Tools around hybrid CPU/GPU inference of mixture-of-experts models.",
        "",
    ]
    tail = ["", "Each command explains itself: hybrimoe simulate --help"]
    return "\n".join([*head, *rows, *tail])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's mistake is one sentence on stderr and exit code 2."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else USAGE_ERROR
    if args[0] == "--version":
        print(f"hybrimoe {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"hybrimoe: {unknown_name('command', args[0], COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return int(importlib.import_module(COMMANDS[args[0]].module).main(args[1:]) or 0)
    except HybriMoEError as error:
        print(f"hybrimoe {args[0]}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough: `hybrimoe simulate --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
