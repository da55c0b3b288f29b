"""Conversations to token ids: what a chat template wants to be given, and one BOS token whoever writes it.

A template does not say what form it reads messages and tools in; it is tried with a mark in either form. A template
is a program of the file's own, so any of this may raise anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hybrimoe_kt.errors import ConfigError, ModelError, first_line

from .call_notations import CallNotation
from .earlier_turns import with_calls, with_thoughts, with_tools

__all__ = ["answer_beginning", "chat_prompt", "encode_chat", "template_takes"]

# Arguments of Transformers' own function, which the template never sees or gets another way.
_TEMPLATE_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages"
}
_MARK = "hybrimoe mark"
_PARTS = [{"type": "text", "text": _MARK}]
_EMPTY = {"description": "", "parameters": {"type": "object", "properties": {}}}
_TOOL = {"name": "hybrimoe_tool", "description": _MARK, "parameters": {"type": "object", "properties": {}}}


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
    *,
    calls: CallNotation | None = None,
) -> list[int]:
    """Return the token ids of a conversation, ready for the assistant's answer.

    A message's content is text, or a list of parts `{"type": "text", "text": ...}`. `tools` are functions in OpenAI's
    notation, `template_options` what else the chat template reads, `calls` how the model writes tool calls. A
    tokenizer without a chat template (a base model's) gets the messages' text, one after the other.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(_text(message.get("content")) for message in messages))["input_ids"])
    options = dict(template_options or {})
    if taken := sorted(options.keys() & _TEMPLATE_ARGUMENTS):
        raise ConfigError(f"{taken[0]!r} is not for the chat template to read; leave it out of its options")
    reads_parts = _shows_mark(tokenizer, _PARTS)
    reads_text = not reads_parts or _shows_mark(tokenizer, _MARK)
    if tools and calls is not None and calls.describes and not template_takes(tokenizer, "tools"):
        messages, tools = with_tools(messages, tools, calls.describes), ()
    functions = _functions(tokenizer, tools or (), options)
    template = "\n".join(_templates(tokenizer))

    def render(turns: list[dict[str, Any]]) -> str:
        return _render(tokenizer, turns, functions, options)

    turns = [_with_content(turn, reads_text, reads_parts) for turn in with_thoughts(messages, template)]
    try:
        text = render(with_calls(turns, calls, template, render))
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"the model's chat template refuses this conversation: {reason}") from None
    return encode_chat(tokenizer, text)


def answer_beginning(tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any]) -> list[int]:
    """What a chat template writes of an answer's turn before the answer, as token ids; none where it does not tell."""
    if tokenizer.chat_template is None:
        return []
    hello: Any = [{"role": "user", "content": "hello"}]
    texts = []
    for begins in (False, True):
        try:
            text = tokenizer.apply_chat_template(
                hello, add_generation_prompt=begins, tokenize=False, **template_options
            )
        except Exception:  # a template that reads parts, say: it is a program of the file's own
            return []
        texts.append(str(text))
    if not texts[1].startswith(texts[0]):
        return []
    return list(tokenizer(texts[1][len(texts[0]) :], add_special_tokens=False)["input_ids"])


def _functions(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The tools in the form that the template reads: bare, or with all that it cannot do without."""
    functions = [dict(tool) for tool in tools]
    if functions and _reads_bare_functions(tokenizer):
        return [dict(tool.get("function", tool)) for tool in functions]
    if functions and not _takes(tokenizer, functions, options):
        whole = [{**tool, "function": {**_EMPTY, **tool.get("function", {})}} for tool in functions]
        return whole if _takes(tokenizer, whole, options) else functions
    return functions


def _takes(tokenizer: PreTrainedTokenizerBase, functions: list[dict[str, Any]], options: Mapping[str, Any]) -> bool:
    try:
        _render(tokenizer, [{"role": "user", "content": "hello"}], functions, options)
    except Exception:
        return False
    return True


def encode_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a rendered conversation, with the BOS and EOS token of every text once, not twice."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if getattr(tokenizer, "add_bos_token", False) and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    if getattr(tokenizer, "add_eos_token", False) and eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return ids


def template_takes(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template reads a variable such as `tools`: one that does not would drop it silently."""
    return any(name in _variables(text) for text in _templates(tokenizer))


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [template or ""]


@lru_cache(16)
def _variables(template: str) -> set[str]:
    environment = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"], autoescape=True)
    # Transformers' own tag, which says what of a conversation an assistant wrote
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        return meta.find_undeclared_variables(environment.parse(plain))
    except TemplateError:
        return set(re.findall(r"\w+", template))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    options: Mapping[str, Any],
) -> str:
    given: Any = conversation  # of text only, by Transformers' annotation
    functions: Any = tools or None
    if any(message.get("content", "") is None for message in conversation):
        # which Transformers' own way in would take out, and templates ask whether it is there
        template = tokenizer.get_chat_template(tools=functions)
        values = {**tokenizer.special_tokens_map, **options}
        rendered: Any = render_jinja_template(
            [given], tools=functions, chat_template=template, add_generation_prompt=True, **values
        )
        return str(rendered[0][0])
    return str(
        tokenizer.apply_chat_template(
            given, tools=functions, add_generation_prompt=True, tokenize=False, **options
        )
    )  # fmt: skip


def _shows_mark(tokenizer: PreTrainedTokenizerBase, content: Any, *tools: dict[str, Any]) -> bool:
    """Whether the mark comes out, and not as Python or JSON write a list of parts."""
    try:
        text = _render(tokenizer, [{"role": "user", "content": content}], list(tools), {})
    except Exception:
        return False
    return _MARK in text and not re.search(r"""['"]type['"]: ?['"]text['"]""", text)


def _reads_bare_functions(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tools get lost in OpenAI's form, within `{"type": "function", "function": ...}`."""
    wrapped = {"type": "function", "function": _TOOL}
    return not _shows_mark(tokenizer, "hello", wrapped) and _shows_mark(tokenizer, "hello", _TOOL)


def _with_content(message: Mapping[str, Any], reads_text: bool, reads_parts: bool) -> dict[str, Any]:
    """The message with its content as it is given where the template reads that, else in the other form."""
    content = message.get("content")
    text = _text(content)  # also to refuse what is no text
    if isinstance(content, str) and not reads_text:
        return {**message, "content": [{"type": "text", "text": text}]}
    if isinstance(content, list) and not reads_parts:
        return {**message, "content": text}
    return dict(message)


def _text(content: Any) -> str:
    """The parts' texts, a line each as llama.cpp has them; what is no text is refused."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if None in texts:
        raise ConfigError('the parts of a message are {"type": "text", "text": ...}; others are not understood')
    return "\n".join(text for text in texts if text is not None)
