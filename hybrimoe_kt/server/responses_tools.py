"""Tools of the Responses interface as functions, and back: those of a namespace are called by both names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from .errors import ApiError
from .responses_schema import Tool

__all__ = ["TOOLS", "functions", "joined", "namespaces"]

logger = logging.getLogger(__name__)

_NO_SEARCH = "this server searches nothing"
_FUNCTION = "describe it as a function"
TOOLS = {
    "web_search_preview": _NO_SEARCH,
    "file_search": _NO_SEARCH,
    "code_interpreter": "this server runs no code",
    "computer": "no model here was taught it",
    "computer_use_preview": "no model here was taught it",
    "image_generation": "this server makes no images",
    "mcp": "this server calls no others; give the functions themselves",
    "tool_search": "give the functions themselves",
    "local_shell": _FUNCTION,
    "shell": _FUNCTION,
    "apply_patch": _FUNCTION,
    "custom": "what a tool is given is JSON here; describe it as a function",
}
"""Types of tools beside "function" and "namespace", and why they are refused."""


def joined(namespace: str | None, name: str) -> str:
    """What the model calls a function."""
    return f"{namespace.rstrip('_')}__{name.lstrip('_')}" if namespace else name


def functions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools as chat requests have them; ApiError for those that are no functions."""
    found: dict[str, dict[str, Any]] = {}
    for place, namespace, tool in _flat(tools):
        if tool.name is None:
            raise ApiError(400, f"{place}.name: Field required", param=f"{place}.name", code="missing")
        name = joined(namespace, tool.name)
        if name in found:
            raise ApiError(400, f"two tools are called {name!r}", param=place)
        function = {"name": name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
        given = {key: value for key, value in function.items() if value is not None}
        found[name] = {"type": "function", "function": given}
    return list(found.values())


def namespaces(tools: Sequence[Tool]) -> dict[str, tuple[str, str]]:
    """What the model calls a function of a namespace -> that and the function's own name."""
    flat = _flat(tools)
    return {joined(space, tool.name): (space, tool.name) for _, space, tool in flat if space and tool.name}


def _flat(tools: Sequence[Tool]) -> Iterator[tuple[str, str | None, Tool]]:
    """Every function with its place in the request and its namespace."""
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        if tool.type == "namespace":
            for inner, one in enumerate(tool.tools or []):
                _check(one, f"{place}.tools[{inner}]")
                yield f"{place}.tools[{inner}]", tool.name, one
        elif tool.type == "web_search":
            _leave_out(tool)
        else:
            _check(tool, place)
            yield place, None, tool


def _leave_out(tool: Tool) -> None:
    """Codex offers a search unasked: of nothing by default, of the web where its sandbox is open."""
    if tool.external_web_access is not False:
        logger.info("a tool of type web_search is left out: %s", _NO_SEARCH)


def _check(tool: Tool, place: str) -> None:
    if tool.type != "function":
        reason = TOOLS.get(tool.type, "only functions are")
        raise ApiError(
            400, f"tools of type {tool.type!r} are not supported: {reason}", param=place, code="unsupported_parameter"
        )  # fmt: skip
