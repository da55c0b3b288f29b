"""How model families write tool calls, one entry each, and which of them a chat template means.

A template is recognised by the marks that stand in it; a family's entry (`Architecture.answer_format`) names the
notation of templates that show none. Patterns are of the `regex` module, as in Transformers' response templates.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .written_calls import Reader, first_of, gemma_calls, json_calls, python_calls, tagged

__all__ = ["CALLS", "CallNotation", "calls_of"]

Called = tuple[str, Mapping[str, Any]]
"""A function's name and the arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallNotation:
    """Tool calls between `open` and `close`, two patterns; without `close` they last to the answer's end."""

    marks: tuple[str, ...]
    """What a chat template holds that means this notation, all of them; none: only a family's entry means it."""
    open: str
    close: str = ""
    read: Reader
    tokens: tuple[str, ...]
    """Texts in the patterns that may be special tokens."""
    ends_thoughts: bool = False
    """Calls may come before the thoughts' closing mark."""
    known_tools_only: bool = False
    """What calls another function than the request's is content: nothing but its shape tells a call from it."""
    must_close: bool = False
    """What its closing mark does not follow is content: half a name would be a name, and half the arguments some."""
    id_pattern: str = ""
    """What the chat template demands of a call's id."""
    make_id: Callable[[str, int], str] = lambda name, number: ""
    """Such an id, of a function's name and how many calls came before; empty where any will do."""
    write: Callable[[Sequence[Called]], str] = lambda calls: ""
    """The calls as the model would have written them, for chat templates that leave them out."""
    describes: str = ""
    """How to call a tool, in words, for models whose chat templates show calls and yet take no tools."""


def _marked(
    open_: str,
    close: str,
    read: Reader,
    *,
    tokens: tuple[str, ...] = (),
    write: Callable[[Sequence[Called]], str] = lambda calls: "",
) -> CallNotation:
    """Everything between two marks, of which a template shows the first."""

    def written(calls: Sequence[Called]) -> str:
        return f"{open_}{inner}{close}" if (inner := write(calls)) else ""

    return CallNotation(
        marks=(open_,), open=re.escape(open_), close=re.escape(close), read=read, tokens=(open_, close, *tokens),
        write=written,
    )  # fmt: skip


def _json_list(calls: Sequence[Called]) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], ensure_ascii=False)


def _python_list(calls: Sequence[Called]) -> str:
    return f"[{', '.join(f'{name}({_python_arguments(arguments)})' for name, arguments in calls)}]"


def _python_arguments(arguments: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)}"
        for key, value in arguments.items()
    )


_PARAMETER = r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
_FUNCTION = r"<function=(?P<name>[^>\n]+)>(?P<arguments>.*?)</function>"
_ARGUMENT = r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
_ARGUMENTS = r"(?P<arguments>(?:\s*<arg_key>.*?</arg_key>\s*<arg_value>.*?</arg_value>)*)"
_DEEPSEEK = tagged(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]+)(?:<｜tool▁sep｜>|\n)"
    r"\s*(?:```json\s)?(?P<json>.*?)(?:\s*```)?\s*(?:<｜tool▁call▁end｜>|\Z)"
)
_DEEPSEEK_CALLS = CallNotation(
    marks=("<｜tool▁call▁begin｜>",),
    open="<｜tool▁calls▁begin｜>",
    close="<｜tool▁calls▁end｜>",
    read=_DEEPSEEK,
    tokens=(
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    describes="To call tools, write this and nothing behind it, a call between begin and end for each:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>\n"
    "NAME is the name of the tool, ARGUMENTS are a JSON object of its parameters.",
)  # fmt: skip
_FENCED = "function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```"
_KIMI = tagged(
    r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^\s<:]+)(?::\d+)?)\s*"
    r"<\|tool_call_argument_begin\|>(?P<json>.*?)(?:<\|tool_call_end\|>|\Z)"
)
_INVOKED = r"invoke name=\"(?P<name>[^\"]+)\">(?P<arguments>.*?)"
_MISTRAL = first_of(
    tagged(r"(?P<name>[^\s\[{]+)(?:\[CALL_ID\](?P<id>[^\[]+))?(?:\[ARGS\])?\s*(?P<json>\{.*\})\s*"), json_calls
)
_LFM2 = _marked("<|tool_call_start|>", "<|tool_call_end|>", first_of(json_calls, python_calls), write=_python_list)
_HARMONY = tagged(r"(?P<name>[^\s<]+)[^{]*?<\|message\|>(?P<json>.*?)(?:<\|call\|>|\Z)")

CALLS: dict[str, CallNotation] = {
    "harmony": CallNotation(
        marks=("<|channel|>", "<|message|>"),
        open=r"(?:<\|start\|>assistant)?(?:<\|channel\|>(?:commentary|analysis))? to=functions\."
        r"(?=[^\s<]+(?:<\|channel\|>(?:commentary|analysis))?\s*(?:<\|constrain\|>)?\w*\s*<\|message\|>)",
        close=r"<\|call\|>|(?=<\|start\|>)",
        read=_HARMONY,
        tokens=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>", "<|end|>"),
    ),
    "solar": CallNotation(
        marks=("<|tool_call:begin|>",),
        open=r"<\|tool_calls\|>",
        close=r"<\|calls\|>",
        read=tagged(
            r"<\|tool_call:begin\|>(?P<id>.*?)<\|tool_call:name\|>(?P<name>.*?)<\|tool_call:args\|>(?P<json>.*?)"
            r"(?:<\|tool_call:end\|>|\Z)"
        ),
        tokens=(
            "<|tool_calls|>", "<|calls|>", "<|tool_call:begin|>", "<|tool_call:name|>", "<|tool_call:args|>",
            "<|tool_call:end|>",
        ),
    ),
    "gigachat": CallNotation(
        marks=("<|function_call|>",),
        open=r"<\|function_call\|>",
        read=json_calls,
        tokens=("<|function_call|>",),
    ),
    "gemma": _marked("<|tool_call>", "<tool_call|>", gemma_calls, tokens=('<|"|>',)),
    "kimi": CallNotation(
        marks=("<|tool_calls_section_begin|>",),
        open=r"<\|tool_calls_section_begin\|>",
        close=r"<\|tool_calls_section_end\|>",
        read=_KIMI,
        tokens=(
            "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
            "<|tool_call_argument_begin|>",
        ),
        ends_thoughts=True,
        id_pattern=r"functions\..+:\d+",
        make_id=lambda name, number: f"functions.{name}:{number}",
    ),
    "dsml": CallNotation(
        marks=("｜DSML｜",),
        open=r"<｜DSML｜(?:function|tool)_calls>",
        close=r"</｜DSML｜(?:function|tool)_calls>",
        read=tagged(
            rf"<｜DSML｜{_INVOKED}</｜DSML｜invoke>",
            r"<｜DSML｜parameter name=\"(?P<key>[^\"]+)\"(?: string=\"(?P<is_text>true|false)\")?>"
            r"(?P<value>.*?)</｜DSML｜parameter>",
        ),
        tokens=("｜DSML｜",),
    ),
    "deepseek-v3": replace(
        _DEEPSEEK_CALLS,
        marks=(*_DEEPSEEK_CALLS.marks, "```json"),
        describes=_DEEPSEEK_CALLS.describes.replace("NAME<｜tool▁sep｜>ARGUMENTS", _FENCED),
    ),
    "deepseek": _DEEPSEEK_CALLS,
    "minimax": _marked(
        "<minimax:tool_call>", "</minimax:tool_call>",
        tagged(rf"<{_INVOKED}</invoke>", r"<parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</parameter>"),
    ),
    "seed": _marked(
        "<seed:tool_call>", "</seed:tool_call>",
        tagged(_FUNCTION, r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>"),
    ),
    "qwen-xml": CallNotation(
        marks=("<tool_call>", "<function="),
        # whose models now and then leave the first mark out
        open=r"<tool_call>|(?=<function=[^>\n]+>)",
        close="</tool_call>",
        read=tagged(_FUNCTION, _PARAMETER),
        tokens=("<tool_call>", "</tool_call>"),
    ),
    "hunyuan-xml": CallNotation(
        marks=("<tool_sep>", "<arg_key>"),
        open="<tool_calls>",
        close="</tool_calls>",
        read=tagged(rf"<tool_call>\s*(?P<name>[^\s<]+)\s*<tool_sep>{_ARGUMENTS}\s*</tool_call>", _ARGUMENT),
        tokens=(
            "<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>", "<tool_sep>", "<arg_key>", "</arg_key>",
            "<arg_value>", "</arg_value>",
        ),
    ),
    "glm": CallNotation(
        marks=("<tool_call>", "<arg_key>"),
        open="<tool_call>",
        close="</tool_call>",
        read=tagged(rf"\s*(?P<name>[^\s<]+){_ARGUMENTS}", _ARGUMENT),
        must_close=True,
        tokens=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "mistral": CallNotation(
        marks=("[TOOL_CALLS]",),
        open=r"\[TOOL_CALLS\]",
        close=r"(?=\[TOOL_CALLS\])",
        read=_MISTRAL,
        tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        id_pattern="[a-zA-Z0-9]{9}",
        make_id=lambda name, number: secrets.token_hex(5)[:9],
    ),
    "lfm2": _LFM2,
    "lfm2-list": replace(_LFM2, marks=("<|tool_list_start|>",)),
    "nemotron": _marked("<TOOLCALL>", "</TOOLCALL>", json_calls, write=_json_list),
    "hunyuan": _marked("<tool_calls>", "</tool_calls>", json_calls, write=_json_list),
    "command": _marked("<|START_ACTION|>", "<|END_ACTION|>", json_calls),
    "granite": CallNotation(
        marks=("<|tool_call|>",),
        open=r"<\|tool_call\|>",
        close=r"<\|/tool_call\|>",
        read=json_calls,
        tokens=("<|tool_call|>", "<|/tool_call|>"),
        write=lambda calls: f"<|tool_call|>{_json_list(calls)}",
    ),
    "hermes": _marked("<tool_call>", "</tool_call>", json_calls),
    "llama": CallNotation(
        marks=("dictionary of argument name",),
        open=r"\A\s*(?:<\|python_(?:start|tag)\|>\s*)?(?=\{\s*\"(?:name|type|function)\"\s*:|\[\s*[A-Za-z_][\w.]*\()",
        close=r"<\|python_end\|>",
        read=first_of(json_calls, python_calls),
        tokens=("<|python_start|>", "<|python_end|>", "<|python_tag|>"),
        known_tools_only=True,
    ),
}  # fmt: skip
"""By name, in the order in which a chat template is asked for their marks."""


def calls_of(template: str, format_name: str = "") -> CallNotation | None:
    """Return the notation of tool calls that a chat template shows, else that of `format_name`; None without either."""
    for notation in CALLS.values():
        if notation.marks and all(mark in template for mark in notation.marks):
            return notation
    return CALLS.get(format_name)
