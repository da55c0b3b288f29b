"""What a rule file does to a model, as data that can be printed or written as JSON."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .classes import replacement
from .injection import Injection, RuleSet, check_operators, holds_weights, match_modules, unused_rules
from .skeletons import build_skeleton, skeleton_names

__all__ = ["best_skeleton", "path_patterns", "report_rules"]

# What a token passes one after the other.
_PART = re.compile(r"model\.embed_tokens(?=$)|model\.layers\.\d+(?=\.|$)|model\.norm(?=$)|lm_head(?=$)")
_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def report_rules(rules: RuleSet, model: nn.Module, *, default_device: str) -> dict[str, Any]:
    """Match the rules, check every operator they name, and return who matched what, ready for JSON."""
    found = match_modules(model, rules, default_device=default_device)
    check_operators(found)
    notes = {rule.replace_class: replacement(rule)[2] for rule in reversed(rules.rules)}
    return {
        "file": rules.file,
        "modules": len(found),
        "rules": [_rule_report(rule, found) for rule in rules.rules],
        "unused": [rule.number for rule in unused_rules(rules, found)],
        "unmatched": [path for path, item in found.items() if item.rule is None],
        "devices": _devices(found.values()),
        "placement": _placement(found, model),
        "notes": [note for note in reversed(notes.values()) if note],
    }


def _rule_report(rule: Any, found: Mapping[str, Injection]) -> dict[str, Any]:
    operator, kwargs, _ = replacement(rule)
    return {
        "number": rule.number,
        "line": rule.line,
        "name": rule.name.pattern if rule.name else None,
        "class": rule.cls,
        "replace": rule.replace_class,
        "operator": operator,
        "kwargs": kwargs,
        "recursive": rule.recursive,
        "modules": [path for path, item in found.items() if item.rule is rule],
    }


def _devices(injections: Iterable[Injection]) -> list[dict[str, Any]]:
    """Return the modules by the pair of devices they are given, in the order of their first module."""
    groups: dict[tuple[str | None, str | None], list[str]] = {}
    for item in injections:
        pair = (item.kwargs.get("prefill_device"), item.kwargs.get("generate_device"))
        groups.setdefault(pair, []).append(item.path)
    return [
        {"prefill_device": prefill, "generate_device": generate, "modules": paths}
        for (prefill, generate), paths in groups.items()
    ]


def _placement(found: Mapping[str, Injection], model: nn.Module) -> dict[str, Any]:
    """Where a token passes: parts in order by device, the layers after which it crosses, and layers on several devices.

    The routed experts do not count: they choose their places themselves. Nor does what holds no weights of its own.
    """
    homes: dict[str, set[str]] = {}
    for path, item in found.items():
        part = _PART.match(path)
        device = item.kwargs.get("generate_device")
        counts = part is not None and device is not None and not path.endswith(".experts")
        if part is not None and counts and holds_weights(model.get_submodule(path), recurse=not item.recursive):
            homes.setdefault(part[0], set()).add(str(device))
    route: list[tuple[str, list[str]]] = []
    for place, devices in sorted(homes.items(), key=lambda home: _along_the_way(home[0])):
        home = "+".join(sorted(devices))
        if not route or route[-1][0] != home:
            route.append((home, []))
        route[-1][1].append(place)
    return {
        "route": [{"device": device, "parts": parts} for device, parts in route],
        "crossings": [[left[1][-1], right[1][0]] for left, right in itertools.pairwise(route)],
        "divided": [part for part, devices in homes.items() if len(devices) > 1],
    }


def _along_the_way(part: str) -> tuple[int, int]:
    """Sorting key: embedding, layers by number, norm, head."""
    if number := _FIRST_NUMBER.search(part):
        return 1, int(number[0])
    return {"model.embed_tokens": 0, "model.norm": 2}.get(part, 3), 0


def best_skeleton(rules: RuleSet) -> str:
    """Return the known architecture on which the fewest rules stay unused; a file named after one wins."""
    stem = Path(rules.file).stem.removesuffix("-multi-gpu")
    names = skeleton_names()
    if stem in names:
        return stem
    unused = {name: _num_unused(rules, build_skeleton(name)) for name in names}
    return min(unused, key=unused.__getitem__)


def _num_unused(rules: RuleSet, model: nn.Module) -> int:
    return len(unused_rules(rules, match_modules(model, rules, default_device="cpu")))


def path_patterns(paths: Iterable[str]) -> list[str]:
    """Fold paths that differ in their first number only: `model.layers.{0..2,5}.mlp`; "" is written "(model)"."""
    groups: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        number = _FIRST_NUMBER.search(path)
        head, tail = (path[: number.start()], path[number.end() :]) if number else (path, "")
        groups.setdefault((head, tail), []).extend([int(number[0])] if number else [])
    return [f"{head}{_ranges(numbers)}{tail}" or "(model)" for (head, tail), numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in spans) + "}"
