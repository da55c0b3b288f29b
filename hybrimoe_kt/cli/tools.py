"""The `hybrimoe` command: dispatches to one module per subcommand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybrimoe_kt import __version__
from hybrimoe_kt.errors import HybriMoEError, unknown_name

from .terminal import INTERRUPTED, discard_output, prepare_streams


class Command(NamedTuple):
    """Where a subcommand lives; its module has `main(arguments) -> int | None` and is imported when called."""

    module: str
    summary: str


COMMANDS: Mapping[str, Command] = {
    "simulate": Command("hybrimoe_kt.cli.simulate", "replay routing on a simulated machine: times, hit rates"),
    "trace": Command("hybrimoe_kt.cli.trace", "record a model's routing: experts, scores, look-ahead, locality"),
    "rules": Command("hybrimoe_kt.cli.rules", "see what a rule file does to a model"),
    "calibrate": Command("hybrimoe_kt.cli.calibrate", "measure CPU, GPU and link, and write this machine's profile"),
    "doctor": Command("hybrimoe_kt.cli.doctor", "what this machine has, which kernels run, what to do next"),
    "plot": Command("hybrimoe_kt.cli.plot", "draw speed-ups, hit rates or a timeline as PNG or SVG"),
}
USAGE_ERROR = 2


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
    prepare_streams()
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
        code = int(importlib.import_module(COMMANDS[args[0]].module).main(args[1:]) or 0)
        sys.stdout.flush()  # here rather than at exit, where nobody catches what goes wrong
        return code
    except HybriMoEError as error:
        print(f"hybrimoe {args[0]}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough: `hybrimoe simulate --json | head`
        discard_output()
        return 0
    except OSError as error:
        discard_output()
        reason = f"{error.filename or 'standard output'}: {error.strerror}" if error.strerror else str(error)
        print(f"hybrimoe {args[0]}: {reason}", file=sys.stderr)
        return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
