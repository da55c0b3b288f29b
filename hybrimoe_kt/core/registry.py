"""Schedulers, policies and predictors by name: the built-in ones, and anybody's own by dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["find"]

_T = TypeVar("_T")


def find(kind: str, name: str, known: Mapping[str, type[_T]], base: type[_T]) -> type[_T]:
    """Return the class called `name`; with a dot in it that is a module's, `my_package.my_module.MyPolicy`.

    ConfigError for a name that is not there, and for a class that is no `base`.
    """
    if name in known:
        return known[name]
    if "." not in name:
        raise ConfigError(unknown_name(kind, name, known))
    module, _, attribute = name.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported ({error}); built in: {', '.join(known)}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{kind} {name!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    return found
