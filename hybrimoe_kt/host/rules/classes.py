"""From the class names of a rule to classes: aliases, imports, and the check of an operator's kwargs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hybrimoe_kt.errors import ConfigError, RuleError, nearest

from . import aliases
from .rule_file import DEFAULT, Rule

__all__ = ["CONTRACT", "blaming", "match_classes", "operator_class", "replacement"]

# What every operator's constructor receives beside the rule's kwargs.
CONTRACT = ("key", "gguf_loader", "config", "orig_module")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def match_classes(rule: Rule) -> tuple[type, ...] | None:
    """Return the classes that `match.class` accepts, None when the rule does not ask for a class."""
    if rule.cls is None:
        return None
    return tuple(_resolve(rule, name, rule.cls, "match.class") for name in aliases.match_class(rule.cls))


def replacement(rule: Rule) -> tuple[str, dict[str, Any], str]:
    """Return the class and kwargs that a rule gives, and the sentence that reports an alias (or "")."""
    cls = aliases.operator_class(rule.replace_class)
    if cls == rule.replace_class:
        return cls, rule.kwargs, ""
    kwargs, dropped = aliases.operator_kwargs(rule.replace_class, cls, rule.kwargs)
    meaning = "the stock module" if cls == DEFAULT else cls
    without = f", without {', '.join(dropped)}" if dropped else ""
    return cls, kwargs, f"{rule.replace_class} stands for {meaning}{without}"


def operator_class(rule: Rule, name: str, kwargs: Mapping[str, Any]) -> type:
    """Import the operator `name` and check that its constructor knows the contract and every kwarg."""
    cls = _resolve(rule, name, rule.replace_class, "replace.class")
    options = _options(cls)
    if options is None:
        takes = f"its constructor does not take {', '.join(CONTRACT)}"
        raise rule.error(f"replace.class {rule.replace_class!r} is not an operator: {takes}", "replace.class")
    takes_any = any(option.kind is inspect.Parameter.VAR_KEYWORD for option in options.values())
    for key in () if takes_any else kwargs:
        if key not in options:
            hint = nearest(key, options) or f"; valid: {', '.join(options) or 'none'}"
            raise rule.error(f"{name} has no option {key!r}{hint}", key)
    for key, option in options.items():
        if key not in kwargs and option.default is option.empty and option.kind in _NAMED:
            raise rule.error(f"{name} needs the option {key!r}; add it to kwargs", key)
    if (check := getattr(cls, "check_kwargs", None)) is not None:
        blaming(rule, name, check, kwargs)
    return cls


def blaming(rule: Rule, name: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call, and turn a ConfigError of the operator `name` into one that points at the rule."""
    try:
        return call(*args, **kwargs)
    except RuleError:
        raise
    except ConfigError as error:
        raise rule.error(f"{name}: {error}") from error


def _resolve(rule: Rule, name: str, written: str, key: str) -> type:
    """Import the class `name`, which the rule file spells `written`."""
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise rule.error(f"{key} {written!r} is not a dotted path such as torch.nn.Linear", key)
    try:
        module = importlib.import_module(module_name)
        cls = getattr(module, class_name, None)  # some modules import their parts only now
    except Exception as error:  # a user's module may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise rule.error(f"{key} {written!r} cannot be imported: {reason}{aliases.legacy_hint(name)}", key) from error
    if cls is None:
        hint = nearest(class_name, (item for item, value in vars(module).items() if inspect.isclass(value)))
        raise rule.error(f"{key} {written!r}: module {module_name} has no class {class_name!r}{hint}", key)
    if not inspect.isclass(cls):
        raise rule.error(f"{key} {written!r} is not a class", key)
    return cls


def _options(cls: type) -> dict[str, inspect.Parameter] | None:
    """Return what a class takes beside the contract, None when it does not take the contract itself."""
    constructor = inspect.getattr_static(cls, "__init__")
    if constructor is nn.Module.__init__:  # takes anything by its signature, and refuses it when called
        return None
    try:
        parameters = dict(inspect.signature(cls).parameters)
    except ValueError:  # some built-in classes tell nothing
        return None
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any and not parameters.keys() >= set(CONTRACT):
        return None
    return {name: parameter for name, parameter in parameters.items() if name not in CONTRACT}
