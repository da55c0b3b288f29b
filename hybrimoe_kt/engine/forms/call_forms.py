"""How an answer that must call a tool is written, for each notation: the way its family's chat templates do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .call_writers import (
    CallWriter,
    Marks,
    TaggedCall,
    called_tool,
    gemma_call,
    in_json,
    python_call,
    with_json,
)

__all__ = ["FORMS", "CallForm", "call_rules", "form_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """Calls between `open` and `close`, in each of which stands `call`."""

    call: CallWriter
    open: str = ""
    close: str = ""
    between: str = ""
    """A literal or expression of Lark."""
    each: bool = False
    """Every call has marks of its own."""
    only_one: bool = False
    """The notation has one call in an answer."""


def call_rules(form: CallForm, marks: Marks, name: str, tools: Sequence[Mapping[str, Any]], *, one: bool) -> str:
    """Return rules in which `name` derives a call of one of `tools`, or more of them unless `one`.

    ConfigError for names that no notation could hold.
    """
    known = [called_tool(number, tool) for number, tool in enumerate(tools)]
    call = f"({' | '.join(f'call_{tool.number}' for tool in known)})"
    open_, close = marks(form.open), marks(form.close)
    if form.each:
        call = f"({open_} {call} {close})"
    if not (one or form.only_one):
        call = f"{call} ({form.between} {call})*"
    whole = call if form.each else f"{open_} {call} {close}"
    return f"{name}: {whole}\n" + "".join(form.call(marks, tool) for tool in known)


_XML_NEVER = ("</function>", "<function=", "<parameter=")
_ARG_NEVER = ("<arg_key>", "</arg_key>", "<arg_value>", "</tool_call>", "</tool_calls>")
_SEP, _END = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def _dsml(calls: str) -> CallForm:
    return CallForm(
        open=f"<｜DSML｜{calls}>\n",
        close=f"</｜DSML｜{calls}>",
        call=TaggedCall(
            before='<｜DSML｜invoke name="NAME">\n',
            after="</｜DSML｜invoke>\n",
            open='<｜DSML｜parameter name="KEY" string="IS_TEXT">',
            close="</｜DSML｜parameter>",
            never=("</｜DSML｜invoke", "<｜DSML｜", f"</｜DSML｜{calls}"),
        ),
    )


_COMMAS, _LINES = '", "', '"\\n"?'
FORMS: Mapping[str, CallForm] = {
    "harmony": CallForm(
        call=with_json("<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "<|call|>"),
        only_one=True,
    ),
    "solar": CallForm(
        open="<|tool_calls|>", close="<|calls|>",
        call=with_json("<|tool_call:begin|>ID<|tool_call:name|>NAME<|tool_call:args|>", "<|tool_call:end|>"),
    ),
    "gigachat": CallForm(open="<|function_call|>", call=in_json(), only_one=True),
    "gemma": CallForm(open="<|tool_call>", close="<tool_call|>", each=True, call=gemma_call),
    "kimi": CallForm(
        open="<|tool_calls_section_begin|>", close="<|tool_calls_section_end|>",
        call=with_json("<|tool_call_begin|>functions.NAME:NUMBER<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    "dsml": _dsml("function_calls"),
    "dsml, tool_calls": _dsml("tool_calls"),
    "deepseek-v3": CallForm(
        open="<｜tool▁calls▁begin｜>", close="<｜tool▁calls▁end｜>", between=_LINES,
        call=with_json(f"<｜tool▁call▁begin｜>function{_SEP}NAME\n```json\n", f"\n```{_END}"),
    ),
    "deepseek": CallForm(
        open="<｜tool▁calls▁begin｜>", close="<｜tool▁calls▁end｜>", between=_LINES,
        call=with_json(f"<｜tool▁call▁begin｜>NAME{_SEP}", _END),
    ),
    "minimax": CallForm(
        open="<minimax:tool_call>\n", close="</minimax:tool_call>",
        call=TaggedCall(
            before='<invoke name="NAME">\n', after="</invoke>\n", open='<parameter name="KEY">', close="</parameter>",
            never=("</invoke>", "<invoke", "<parameter", "</minimax:tool_call>"),
        ),
    ),
    "seed": CallForm(
        open="<seed:tool_call>\n", close="\n</seed:tool_call>", each=True, between=_LINES,
        call=TaggedCall(
            before="<function=NAME>\n", after="</function>", open="<parameter=KEY>", close="</parameter>",
            never=(*_XML_NEVER, "</seed:tool_call>"),
        ),
    ),
    "qwen-xml": CallForm(
        open="<tool_call>\n", close="\n</tool_call>", each=True, between=_LINES,
        call=TaggedCall(
            before="<function=NAME>\n", after="</function>", open="<parameter=KEY>\n", close="\n</parameter>",
            never=(*_XML_NEVER, "</tool_call>"),
        ),
    ),
    "hunyuan-xml": CallForm(
        open="<tool_calls>\n", close="</tool_calls>",
        call=TaggedCall(
            before="<tool_call>NAME<tool_sep>\n", after="</tool_call>\n", open="<arg_key>KEY</arg_key>\n<arg_value>",
            close="</arg_value>", never=_ARG_NEVER,
        ),
    ),
    "glm": CallForm(
        open="<tool_call>", close="</tool_call>", each=True, between=_LINES,
        call=TaggedCall(
            before="NAME\n", after="", open="<arg_key>KEY</arg_key>\n<arg_value>", close="</arg_value>",
            never=_ARG_NEVER,
        ),
    ),
    "mistral": CallForm(open="[TOOL_CALLS]", call=with_json("NAME[ARGS]"), each=True),
    "mistral, listed": CallForm(open="[TOOL_CALLS][", close="]", call=in_json(), between=_COMMAS),
    "lfm2": CallForm(
        open="<|tool_call_start|>[", close="]<|tool_call_end|>", call=python_call, between=_COMMAS
    ),
    "nemotron": CallForm(open="<TOOLCALL>[", close="]</TOOLCALL>", call=in_json(), between=_COMMAS),
    "hunyuan": CallForm(open="<tool_calls>[", close="]</tool_calls>", call=in_json(), between=_COMMAS),
    "command": CallForm(
        open="<|START_ACTION|>[", close="]<|END_ACTION|>", between=_COMMAS,
        call=in_json("tool_name", "parameters", first='"tool_call_id": "NUMBER", '),
    ),
    "granite": CallForm(open="<|tool_call|>[", close="]", call=in_json(), between=_COMMAS),
    "hermes": CallForm(
        open="<tool_call>\n", close="\n</tool_call>", each=True, between=_LINES, call=in_json()
    ),
    "llama": CallForm(call=in_json(arguments="parameters"), only_one=True),
}  # fmt: skip
"""By the names that `CALLS` has, and variants of two that a chat template tells apart."""


def form_of(name: str, template: str) -> CallForm:
    """Return the form of the notation `name`, as the chat template `template` has it."""
    if name == "mistral" and "[ARGS]" not in template:
        return FORMS["mistral, listed"]
    if name == "dsml" and "｜DSML｜tool_calls" in template:
        return FORMS["dsml, tool_calls"]
    return FORMS["lfm2" if name == "lfm2-list" else name]
