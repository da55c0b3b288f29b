"""The rule engine: which module of a model becomes which operator, on which device.

Same grammar and same decisions as kTransformers' own engine, for any `torch.nn.Module`:

- modules are visited parent first; for each the rules are tried in file order and the first match decides;
- `match.name` is searched in the dotted path (the root's is ""), `match.class` is an isinstance test, both must hold;
- a module no rule matches stays, with `{generate_device, prefill_device}` set to the default device;
- `recursive: false` keeps the engine out of the submodules, also when the module itself stays;
- operators are injected into the *original* modules, parents before children; the root is never replaced.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import aliases
from .classes import CONTRACT, blaming, match_classes, operator_class, replacement
from .rule_file import DEFAULT, Rule, RuleSet, list_packaged_rules, load_rules, packaged_rules

__all__ = [
    "DEFAULT",
    "Injection",
    "Rule",
    "RuleSet",
    "check_operators",
    "holds_weights",
    "inject",
    "list_packaged_rules",
    "load_rules",
    "match_modules",
    "packaged_rules",
    "unused_rules",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Injection:
    """What the rules decided for the module at `path`; `kwargs` is its own copy, `rule` the one that matched."""

    path: str
    cls: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    rule: Rule | None = None
    recursive: bool = True


def match_modules(
    model: nn.Module, rules: RuleSet, *, default_device: str, onto: Mapping[str, Injection] | None = None
) -> dict[str, Injection]:
    """Return the decision for every visited module by path, parents first; the model is not changed.

    `onto` continues an earlier result with a second rule file: classes already chosen stay, kwargs are merged.
    """
    matcher = _Matcher(rules, getattr(getattr(model, "config", None), "model_type", ""))
    return matcher.walk(model, default_device, dict(onto or {}))


def holds_weights(module: nn.Module, *, recurse: bool) -> bool:
    """Whether parameters or buffers stand in a module itself, or also below it."""
    return any(True for tensors in (module.parameters(recurse), module.buffers(recurse)) for _ in tensors)


def unused_rules(rules: RuleSet, injections: Mapping[str, Injection]) -> list[Rule]:
    """Return the rules that decided nothing, because no module matches or an earlier rule always came first."""
    used = {id(injection.rule) for injection in injections.values()}
    return [rule for rule in rules.rules if id(rule) not in used]


def inject(
    model: nn.Module,
    injections: Mapping[str, Injection],
    *,
    gguf_loader: Any,
    config: Any,
    construct: Callable[..., nn.Module] | None = None,
) -> list[tuple[Injection, nn.Module]]:
    """Replace the decided modules in place, on the meta device, and return the new operators in order.

    Every class and its kwargs are checked before the first module is replaced. `construct(cls, **kwargs)` builds an
    operator when given, else `cls(**kwargs)` does. `gguf_loader.tensor_device_map[path]` is set where there is one.
    """
    classes = check_operators(injections)
    injector = _Injector(injections, classes, gguf_loader, config, construct)
    with torch.device("meta"):
        injector.descend(model, "")
    return injector.operators


def check_operators(injections: Mapping[str, Injection]) -> dict[str, type]:
    """Return the operator class for every path that gets one, its kwargs checked against its constructor.

    A class whose constructor takes `**kwargs` may offer a class method `check_kwargs(kwargs)` that raises ConfigError.
    """
    chosen = {path: injection for path, injection in injections.items() if path and injection.cls != DEFAULT}
    return {path: operator_class(_rule(item), item.cls, item.kwargs) for path, item in chosen.items()}


class _Matcher:
    """The rules of one file with their classes resolved, ready to walk a model."""

    def __init__(self, rules: RuleSet, model_type: str) -> None:
        self.model_type = model_type
        self.targets = {rule.number: replacement(rule) for rule in rules.rules}
        self.rules = [(rule, match_classes(rule)) for rule in rules.rules]
        for note in {rule.replace_class: self.targets[rule.number][2] for rule in reversed(rules.rules)}.values():
            if note:
                logger.info("%s: %s", rules.file, note)

    def first(self, path: str, module: nn.Module) -> Rule | None:
        for rule, classes in self.rules:
            if classes is not None and not isinstance(module, classes):
                continue
            if rule.name is None or rule.name.search(aliases.legacy_spelling(rule.name.pattern, path, self.model_type)):
                return rule
        return None

    def walk(
        self, module: nn.Module, default_device: str, found: dict[str, Injection], path: str = ""
    ) -> dict[str, Injection]:
        rule = self.first(path, module)
        if rule is not None:
            found[path] = self.decide(path, rule, found.get(path))
        elif path not in found:
            devices = {"generate_device": default_device, "prefill_device": default_device}
            found[path] = Injection(path, DEFAULT, devices)
        if rule is None or rule.recursive:
            for name, child in module._modules.items():
                if child is not None:
                    self.walk(child, default_device, found, f"{path}.{name}" if path else name)
        return found

    def decide(self, path: str, rule: Rule, earlier: Injection | None) -> Injection:
        cls, kwargs, _ = self.targets[rule.number]
        kwargs = copy.deepcopy(kwargs)
        if earlier is not None:
            cls = cls if earlier.cls == DEFAULT else earlier.cls
            kwargs = {**earlier.kwargs, **kwargs}
        return Injection(path, cls, kwargs, rule, rule.recursive)


@dataclass
class _Injector:
    injections: Mapping[str, Injection]
    classes: Mapping[str, type]
    gguf_loader: Any
    config: Any
    construct: Callable[..., nn.Module] | None
    operators: list[tuple[Injection, nn.Module]] = field(default_factory=list)

    def descend(self, parent: nn.Module, prefix: str, adopter: nn.Module | None = None) -> None:
        """Put operators in place of the modules of `parent`, and of those that the operator `adopter` took of them."""
        for name, child in list(parent._modules.items()):
            injection = self.injections.get(prefix + name)
            if child is None or injection is None:
                continue
            if (device_map := getattr(self.gguf_loader, "tensor_device_map", None)) is not None:
                device_map[injection.path] = injection.kwargs
            operator = None
            if injection.cls != DEFAULT:
                operator = self.build(injection, child)
                setattr(parent, name, operator)
                if adopter is not None and adopter._modules.get(name) is child:
                    setattr(adopter, name, operator)
                self.operators.append((injection, operator))
            self.descend(child, f"{prefix}{name}.", operator)

    def build(self, injection: Injection, child: nn.Module) -> nn.Module:
        cls = self.classes[injection.path]
        contract = dict(zip(CONTRACT, (injection.path, self.gguf_loader, self.config, child), strict=True))
        make = functools.partial(self.construct, cls) if self.construct else cls
        rule = _rule(injection)
        operator = blaming(rule, injection.cls, make, **contract, **injection.kwargs)
        if not isinstance(operator, nn.Module):
            raise rule.error(f"{injection.cls} is not a torch.nn.Module and cannot replace {injection.path}")
        return operator


def _rule(injection: Injection) -> Rule:
    assert injection.rule is not None, f"{injection.path}: a class other than default comes from a rule"
    return injection.rule
