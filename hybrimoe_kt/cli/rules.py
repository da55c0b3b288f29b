"""`hybrimoe rules`: what a rule file does to a model, before any weights are loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrimoe_kt.host.rules.rule_file import list_packaged_rules, load_rules

from .terminal import Parser

__all__ = ["add_parser", "build_parser", "main"]

EXAMPLES = """examples:
  hybrimoe rules check my.yaml                     on the architecture that fits
  hybrimoe rules check my.yaml --model deepseek2   on DeepSeek-V2-Lite's modules
  hybrimoe rules check my.yaml --model DIR --json  on what DIR/config.json says
  hybrimoe rules list                              the packaged rule files
"""
PATTERNS_SHOWN = 6


def build_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """Return the parser of `hybrimoe rules`, or fill the given one."""
    parser = parser or Parser(prog="hybrimoe rules")
    parser.description = "Show what a rule file does to a model. No weights are needed."
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|list")
    check = actions.add_parser(
        "check",
        help="which modules each rule matches",
        description="Check a rule file: which modules each rule matches, and on which device.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", metavar="FILE", help="a rule file, or the name of a packaged one")
    check.add_argument("--model", metavar="NAME", help="architecture (such as qwen3moe) or directory with config.json")
    check.add_argument("--device", default="cpu", metavar="DEVICE", help="of modules no rule matches (default: cpu)")
    check.add_argument("--json", action="store_true", help="print everything as JSON")
    check.set_defaults(run=_check)
    listing = actions.add_parser(
        "list",
        help="the packaged rule files",
        description="List the packaged rule files.",
        epilog="example:\n  hybrimoe rules list --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listing.add_argument("--json", action="store_true", help="print as JSON")
    listing.set_defaults(run=_list)
    return parser


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `rules` to a parser's subcommands."""
    return build_parser(subparsers.add_parser("rules", help="see what a rule file does to a model"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hybrimoe rules`; raises HybriMoEError, which the dispatcher prints with exit code 2."""
    options = build_parser().parse_args(argv)
    options.run(options, Console(highlight=False, soft_wrap=True))
    return 0


def _check(options: argparse.Namespace, console: Console) -> None:
    rules = load_rules(list_packaged_rules().get(options.file, options.file))
    # Importing torch and transformers takes seconds: complain about the file itself first.
    from hybrimoe_kt.host.rules.report import best_skeleton, report_rules
    from hybrimoe_kt.host.rules.skeletons import build_skeleton, skeleton_from_directory

    name = options.model or best_skeleton(rules)
    model = skeleton_from_directory(name) if Path(name).is_dir() else build_skeleton(name)
    report = {"model": name} | report_rules(rules, model, default_device=options.device)
    if options.json:
        console.print(json.dumps(report, indent=2), markup=False)
    else:
        chosen = "" if options.model else " (the architecture that fits best; --model names another)"
        console.print(str(rules.file), style="bold", markup=False)
        console.print(f"on {name}, {report['modules']} modules{chosen}", markup=False)
        _print_report(report, console)


def _print_report(report: dict[str, Any], console: Console) -> None:
    for rule in report["rules"]:
        operator = rule["operator"].rpartition(".")[2]
        condition = " and ".join(f"{key} {rule[key]}" for key in ("name", "class") if rule[key] is not None)
        console.print(f"\nrule {rule['number']} (line {rule['line']})  {condition}", markup=False)
        _print_modules(f"-> {operator}", rule["modules"], console)
        if rule["kwargs"]:
            console.print("   with " + ", ".join(f"{k}: {v}" for k, v in rule["kwargs"].items()), markup=False)
    if report["unmatched"]:
        console.print("\nno rule")
        _print_modules("-> default", report["unmatched"], console)
    console.print("\ndevices", style="bold")
    for group in report["devices"]:
        prefill, generate = (group[key] or "not named" for key in ("prefill_device", "generate_device"))
        label = f"{prefill}:" if prefill == generate else f"prefill {prefill}, decode {generate}:"
        _print_modules(label, group["modules"], console)
    _print_placement(report["placement"], console)
    for note in report["notes"]:
        console.print(f"note: {note}", style="dim", markup=False)
    for number in report["unused"]:
        line = report["rules"][number - 1]["line"]
        console.print(f"warning: rule {number} (line {line}) decides nothing on this model", style="yellow")


def _print_placement(placement: dict[str, Any], console: Console) -> None:
    """The device map: which parts of the way through the model lie where, and where the hidden states cross."""
    from hybrimoe_kt.host.rules.report import path_patterns

    console.print("\na token passes (experts choose their place themselves)", style="bold")
    for stage in placement["route"]:
        console.print(f"   {stage['device']}: {', '.join(path_patterns(stage['parts']))}", markup=False)
    for before, after in placement["crossings"]:
        console.print(f"   crosses between {before} and {after}", style="dim", markup=False)
    for part in placement["divided"]:
        console.print(f"warning: {part} has modules on several devices: states cross inside it", style="yellow")


def _print_modules(label: str, paths: list[str], console: Console) -> None:
    from hybrimoe_kt.host.rules.report import path_patterns

    patterns = path_patterns(paths)
    modules = "no module" if not paths else "1 module" if len(paths) == 1 else f"{len(paths)} modules"
    console.print(f"   {label} {modules}", style=None if paths else "yellow", markup=False)
    for pattern in patterns[:PATTERNS_SHOWN]:
        console.print(f"      {pattern}", style="cyan", markup=False)
    if len(patterns) > PATTERNS_SHOWN:
        console.print(f"      and {len(patterns) - PATTERNS_SHOWN} more kinds; --json lists them all", style="dim")


def _list(options: argparse.Namespace, console: Console) -> None:
    rows: list[dict[str, Any]] = [
        {"architecture": name, "file": str(file), "rules": len(load_rules(file).rules)}
        for name, file in list_packaged_rules().items()
    ]
    if options.json:
        console.print(json.dumps(rows, indent=2), markup=False)
        return
    width = max(len(row["architecture"]) for row in rows)
    for row in rows:
        rules = "1 rule " if row["rules"] == 1 else f"{row['rules']} rules"
        console.print(f"{row['architecture']:<{width}}  {rules}  {Path(row['file']).name}", markup=False)
    console.print(f"in {Path(rows[0]['file']).parent}", style="dim", markup=False)
