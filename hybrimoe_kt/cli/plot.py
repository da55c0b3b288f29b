"""`hybrimoe plot`: pictures of traces, timelines and simulations as PNG or SVG, or their numbers as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrimoe_kt.errors import ConfigError

from .terminal import Parser, check_writable

EXAMPLE = """\
examples:
  hybrimoe plot heat-map --trace my.npz -o map.svg
  hybrimoe plot over-time --trace my.npz -o time.png
  hybrimoe plot occupancy --trace my.npz --layer 3 -o cache.png
  hybrimoe plot hit-rate --trace my.npz -o hits.png
  hybrimoe plot timeline --timeline run.json -o step.png
  hybrimoe plot timeline --model qwen2-57b-a14b -o step.png
  hybrimoe plot speedups --hardware a6000-xeon5220r -o speedups.svg

Each picture explains its options: hybrimoe plot occupancy --help
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's options, one subcommand per picture."""
    result = Parser(
        prog="hybrimoe plot",
        description="Draw routing, caches, timelines and speed-ups; --json prints the numbers drawn.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pictures = result.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, (describe, add) in PICTURES.items():
        text, example = describe
        one = pictures.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  hybrimoe plot {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("--output", "-o", type=Path, metavar="FILE", help="picture to write, .png or .svg")
        one.add_argument("--json", action="store_true", help="print the numbers drawn; the picture is then optional")
        add(one)
    return result


def main(arguments: Sequence[str]) -> int:
    """Draw one picture and say where it is, or print its numbers."""
    options = parser().parse_args(arguments)
    from hybrimoe_kt.sim import drawing

    from . import pictures

    if options.output is None and not options.json:
        raise ConfigError("nothing to do: give --output FILE for a picture, --json for its numbers")
    if options.output is not None:
        drawing.check_format(options.output)
        check_writable(options.output, "--output")
        drawing.pyplot()  # said before the work if it is missing
    picture = pictures.MAKE[options.picture](options)
    if options.output is not None:
        drawing.save(picture.draw(), options.output)
    if options.json:
        print(json.dumps({"picture": options.picture} | picture.numbers, indent=2, allow_nan=False))
    else:
        print(options.output)
    return 0


def _trace(add: Any, *, required: bool = True) -> None:
    add("--trace", required=required, metavar="FILE", help="recorded routing (.npz or route CSV)")


def _synthetic(add: Any) -> None:
    add("--model", action="append", metavar="NAME", help="model of a synthetic trace, instead of --trace")
    add("--prompt-tokens", type=int, default=128, metavar="N", help="of the synthetic prompt (default: %(default)s)")
    add("--tokens", type=int, default=32, metavar="N", help="decode steps (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the synthetic trace (default: %(default)s)")


def _policies(add: Any, default: str) -> None:
    add("--policy", action="append", metavar="NAME", help=f"cache policy, may be given again (default: {default})")


def _heat_map(one: argparse.ArgumentParser) -> None:
    _trace(one.add_argument)
    one.add_argument("--phase", choices=("all", "prefill", "decode"), default="all", help="tokens that count")
    one.add_argument("--sorted", action="store_true", help="each layer's most used experts first, which shows the skew")


def _over_time(one: argparse.ArgumentParser) -> None:
    _trace(one.add_argument)
    _policies(one.add_argument, "lru, lfu, mrs, adaptive; belady is always the reference")
    one.add_argument(
        "--cache",
        action="append",
        metavar="SIZE",
        help="12.5%%, 8 (per layer), 1GiB; may be given again (12.5%%, 25%%)",
    )
    one.add_argument("--window", type=int, default=32, metavar="N", help="steps averaged (default: %(default)s)")


def _occupancy(one: argparse.ArgumentParser) -> None:
    _trace(one.add_argument)
    one.add_argument("--layer", type=int, metavar="N", help="as the model numbers it (default: the first with experts)")
    one.add_argument("--policy", default="adaptive", metavar="NAME", help="cache policy (default: %(default)s)")
    one.add_argument("--cache", default="25%", metavar="SIZE", help="25%%, 8 (per layer) or 1GiB (default: 25%%)")
    one.add_argument("--from", dest="first", type=int, default=0, metavar="STEP", help="first step shown (default: 0)")
    one.add_argument("--to", dest="end", type=int, metavar="STEP", help="step to stop before (default: 120 later)")


def _hit_rate(one: argparse.ArgumentParser) -> None:
    _trace(one.add_argument, required=False)
    _policies(one.add_argument, "all")
    _synthetic(one.add_argument)


def _timeline(one: argparse.ArgumentParser) -> None:
    add = one.add_argument
    add("--timeline", type=Path, metavar="FILE", help="written by --timeline of ktransformers or hybrimoe simulate")
    add("--step", type=int, metavar="N", help="step of the file to draw (default: the last decode step)")
    add("--from", dest="from_ms", type=float, metavar="MS", help="draw from this moment of the file instead")
    add("--to", dest="to_ms", type=float, metavar="MS", help="and to this one")
    _trace(add, required=False)
    add("--hardware", default="default", help="profile a step is simulated on (default: %(default)s)")
    add("--cache", default="25%", metavar="SIZE", help="experts on the GPU in the simulation (default: 25%%)")
    add("--method", action="append", metavar="NAME", help="method simulated (default: default)")
    _synthetic(add)


def _speedups(one: argparse.ArgumentParser) -> None:
    add = one.add_argument
    add("--hardware", default="default", help="built-in profile or profile file (default: %(default)s)")
    add("--method", action="append", metavar="NAME", help="method, may be given again (default: the main ones)")
    _synthetic(add)


PICTURES = {
    "heat-map": (
        ("how often each expert of each layer is chosen", "--trace my.npz --sorted --output map.svg"),
        _heat_map,
    ),
    "over-time": (
        ("hit rate over the steps of a trace, per policy and cache size", "--trace my.npz --cache 25% -o time.png"),
        _over_time,
    ),
    "occupancy": (
        ("which experts one layer's cache holds over time", "--trace my.npz --layer 3 --policy lru -o cache.png"),
        _occupancy,
    ),
    "hit-rate": (
        ("hit rate over cache size, per policy", "--trace my.npz --policy lru --policy belady -o hits.png"),
        _hit_rate,
    ),
    "timeline": (
        ("what CPU, GPU and link did in one step, recorded or simulated", "--timeline run.json --step 5 -o step.svg"),
        _timeline,
    ),
    "speedups": (
        ("speed-up of methods over static placement, per model and cache size", "--hardware default -o speedups.svg"),
        _speedups,
    ),
}
