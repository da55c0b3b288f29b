"""Schedulers, policies and predictors by name: the built-in ones, and anybody's own by dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from hybrimoe_kt.dotted import is_dotted, load_dotted
from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["find"]

_T = TypeVar("_T")


def find(kind: str, name: str, known: Mapping[str, type[_T]], base: Any) -> type[_T]:
    """Return the class called `name`; one that is not known is named by its place, `my_module:MyPolicy`.

    ConfigError for a name that is not there, and for a class that is no `base`.
    """
    if name in known:
        return known[name]
    if not is_dotted(name):
        raise ConfigError(unknown_name(kind, name, known))
    try:
        found = load_dotted(name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported ({error}); built in: {', '.join(known)}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{kind} {name!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"{kind} {name!r} lacks {' and '.join(lacking)}, see {base.__module__}.{base.__qualname__}")
    return found
