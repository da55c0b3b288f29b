"""Reads a rule file: kTransformers' YAML grammar, every complaint with its line.

A rule file is a list; each entry is

    - match: {name: REGEX, class: DOTTED.PATH}      # at least one of the two; both must hold
      replace: {class: DOTTED.PATH, kwargs: {...}}  # class defaults to "default": keep the module
      recursive: false                              # optional: leave the submodules alone

Only plain YAML is read (`yaml.SafeLoader`), so a file can name classes but cannot build objects.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hybrimoe_kt.errors import RuleError, nearest

__all__ = ["DEFAULT", "Rule", "RuleSet", "list_packaged_rules", "load_rules", "packaged_rules"]

DEFAULT = "default"
RULE_KEYS = ("match", "replace", "recursive")
MATCH_KEYS = ("name", "class")
REPLACE_KEYS = ("class", "kwargs")


@dataclass(frozen=True)
class Rule:
    """One entry of a rule file; `number` counts from 1, `line` is its first line."""

    number: int
    line: int
    name: re.Pattern[str] | None
    cls: str | None
    replace_class: str = DEFAULT
    kwargs: dict[str, Any] = field(default_factory=dict)
    recursive: bool = True
    file: str = ""

    def error(self, message: str, key: str | None = None) -> RuleError:
        """Return (not raise) the error that points at this rule."""
        return RuleError(message, file=self.file or None, line=self.line, rule=self.number, key=key)


@dataclass(frozen=True)
class RuleSet:
    """The rules of one file, in the order in which they are tried."""

    file: str
    rules: tuple[Rule, ...]


def load_rules(path: str | Path) -> RuleSet:
    """Read and check a rule file; classes are resolved later, when a model is there to be matched."""
    file = str(path)
    root, loader = _compose(file)
    if not isinstance(root, yaml.SequenceNode):
        found = "nothing" if root is None else {"map": "a mapping"}.get(root.tag.rsplit(":", 1)[-1], "a single value")
        raise RuleError(
            f"a rule file is a list of '- match: ... replace: ...' entries, this one holds {found}",
            file=file,
            line=None if root is None else root.start_mark.line + 1,
        )
    rules = tuple(_Reader(file, number, node, loader).rule() for number, node in enumerate(root.value, start=1))
    return RuleSet(file, rules)


def list_packaged_rules() -> dict[str, Path]:
    """Return the packaged rule files by name: an architecture's, or `default` for one without a file."""
    folder = Path(str(resources.files("hybrimoe_kt.optimize_rules")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"), key=lambda file: file.stem)}


def packaged_rules(name: str) -> Path:
    """Return the packaged rule file of that name, or the default one, which serves any architecture."""
    files = list_packaged_rules()
    return files.get(name, files[DEFAULT])


def _compose(file: str) -> tuple[yaml.Node | None, yaml.SafeLoader]:
    """Return the file's YAML tree with its line marks, and the loader that can turn nodes into values."""
    try:
        loader = yaml.SafeLoader(Path(file).read_text(encoding="utf-8"))
        return loader.get_single_node(), loader
    except FileNotFoundError:
        raise RuleError("the rule file does not exist; give the path of a YAML file", file=file) from None
    except OSError as error:
        raise RuleError(f"the rule file cannot be read: {error.strerror}", file=file) from None
    except UnicodeDecodeError:
        raise RuleError("the rule file is not UTF-8 text", file=file) from None
    except yaml.YAMLError as error:
        raise _yaml_error(file, error) from None
    except RecursionError:
        raise RuleError("the rule file nests too deeply to be a rule file", file=file) from None


def _yaml_error(file: str, error: yaml.YAMLError, rule: int | None = None) -> RuleError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
    return RuleError(f"not valid YAML: {problem}", file=file, line=mark and mark.line + 1, rule=rule)


class _Reader:
    """Turns one YAML node into a Rule; knows where it stands so that errors can say so."""

    def __init__(self, file: str, number: int, node: yaml.Node, loader: yaml.SafeLoader) -> None:
        self.file, self.number, self.node, self.loader = file, number, node, loader

    def fail(self, message: str, node: yaml.Node | None = None, key: str | None = None) -> RuleError:
        line = (node or self.node).start_mark.line + 1
        return RuleError(message, file=self.file, line=line, rule=self.number, key=key)

    def rule(self) -> Rule:
        parts = self.mapping(self.node, "rule", RULE_KEYS)
        for key in ("match", "replace"):
            if key not in parts:
                raise self.fail(f"{key!r} is missing; a rule needs both 'match' and 'replace'", key=key)
        match = self.mapping(parts["match"], "match", MATCH_KEYS)
        if not match:
            raise self.fail("'match' needs at least one of 'name' and 'class'", parts["match"], "match")
        replace = self.mapping(parts["replace"], "replace", REPLACE_KEYS)
        return Rule(
            number=self.number,
            line=self.node.start_mark.line + 1,
            name=self.pattern(match["name"]) if "name" in match else None,
            cls=self.text(match["class"], "match.class") if "class" in match else None,
            replace_class=self.text(replace["class"], "replace.class") if "class" in replace else DEFAULT,
            kwargs=self.kwargs(replace["kwargs"]) if "kwargs" in replace else {},
            recursive=self.boolean(parts["recursive"]) if "recursive" in parts else True,
            file=self.file,
        )

    def mapping(self, node: yaml.Node, where: str, valid: Iterable[str]) -> dict[str, yaml.Node]:
        """Return the node's entries by key, refusing unknown and repeated keys."""
        key = None if where == "rule" else where
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(f"{where!r} must be a mapping with the keys {', '.join(valid)}", node, key)
        entries: dict[str, yaml.Node] = {}
        seen: set[str] = set()
        with self.yaml_errors(node):
            self.loader.flatten_mapping(node)  # resolves "<<": merged entries come first and may be overridden
        for key_node, value in node.value:
            name = str(key_node.value)
            if name not in valid:
                hint = nearest(name, valid) or f"; valid: {', '.join(valid)}"
                raise self.fail(f"unknown key {name!r} in {where!r}{hint}", key_node, name)
            written_here = node.start_mark.index <= key_node.start_mark.index < node.end_mark.index
            if written_here and name in seen:
                raise self.fail(f"{name!r} appears twice in {where!r}; is a '-' missing before it?", key_node, name)
            seen.update((name,) if written_here else ())
            entries[name] = value
        return entries

    def value(self, node: yaml.Node) -> Any:
        with self.yaml_errors(node):
            return self.loader.construct_object(node, deep=True)

    @contextlib.contextmanager
    def yaml_errors(self, node: yaml.Node) -> Iterator[None]:
        try:
            yield
        except yaml.YAMLError as error:
            raise _yaml_error(self.file, error, self.number) from None
        except ValueError as error:  # text that looks like a date or a number and is none
            raise self.fail(f"not valid YAML: {error}", node) from None
        except RecursionError:
            raise self.fail("nests too deeply to be a rule", node) from None

    def text(self, node: yaml.Node, key: str) -> str:
        value = self.value(node)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(f"{key} must be text, got {value!r}", node, key)
        return value

    def pattern(self, node: yaml.Node) -> re.Pattern[str]:
        text = self.value(node)
        if not isinstance(text, str):
            raise self.fail(f"match.name must be a regular expression in quotes, got {text!r}", node, "match.name")
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.fail(f"match.name {text!r} is not a regular expression: {error}", node, "match.name") from None

    def kwargs(self, node: yaml.Node) -> dict[str, Any]:
        value = self.value(node)
        if value is None:  # every option below "kwargs:" is commented out
            return {}
        if not isinstance(value, dict):
            raise self.fail(f"replace.kwargs must be a mapping of options, got {value!r}", node, "replace.kwargs")
        for key in value:
            if not isinstance(key, str):
                raise self.fail(f"replace.kwargs: option names are text, got {key!r}", node, "replace.kwargs")
        return value

    def boolean(self, node: yaml.Node) -> bool:
        value = self.value(node)
        if not isinstance(value, bool):
            raise self.fail(f"recursive must be true or false, got {value!r}", node, "recursive")
        return value
