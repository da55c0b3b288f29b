"""What a whole answer is held to: first thoughts, in which anything may stand, then content of a form or tool calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe_kt.engine.chat.call_notations import CALLS
from hybrimoe_kt.engine.chat.response_format import ResponseFormat, ends_with
from hybrimoe_kt.engine.chat.thought_notations import ThoughtNotation
from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.errors import ConfigError

from .call_forms import call_rules, form_of
from .call_writers import Marks

__all__ = ["AnswerForms"]


@dataclass(frozen=True, slots=True)
class AnswerForms:
    """Makes the forms of one model's answers."""

    format: ResponseFormat
    chat_template: str
    special: Mapping[str, int]
    """Special tokens, which are no part of a text, by theirs."""
    end_ids: Collection[int]

    def held(
        self,
        prompt_end: str,
        constraint: Constraint | None,
        tools: Sequence[Mapping[str, Any]],
        forced: Collection[str],
        *,
        one_call: bool,
    ) -> Constraint | None:
        """Return the form of the answer to a prompt that ends with `prompt_end`; None where it is free.

        `forced` names tools of which it must call one, or several unless `one_call`; else `constraint` holds for the
        content, and calls of `tools` are as good. ConfigError for a model of which neither can be said.
        """
        if constraint is None and not forced:
            return None
        if self.format.own is not None:
            raise ConfigError(
                "answers cannot be held to a form: this tokenizer brings its own description of the model's answers "
                "along (response_template)"
            )
        marks = Marks(self.special, frozenset(self.end_ids))
        if forced:
            wanted = [tool for tool in tools if tool.get("function", tool).get("name") in forced]
            return Constraint.within(self._lead(prompt_end, marks) + self._calls(wanted, marks, one_call), None)
        assert constraint is not None, "one of the two is there"
        rules = self._lead(prompt_end, marks)
        calls = self._calls(tools, marks, one_call, name="calls") if tools and self.format.calls else ""
        rules += f"body: content{' | calls' if calls else ''}\n{calls}"
        form = "form"
        if constraint.kind == "grammar":
            form = "@form"
        else:
            rules += constraint.rules("form")
        rules += f"content: {self._content(marks, constraint)} {form}\n"
        return Constraint.within(rules, constraint if constraint.kind == "grammar" else None)

    def _lead(self, prompt_end: str, marks: Marks) -> str:
        """Rules of `start`: what may or must come before `body`."""
        thoughts = self.format.thoughts
        if thoughts is None or ends_with(prompt_end, thoughts.close):
            return "start: body\n"
        rest = f"thoughts_rest {marks(thoughts.turn)} {'SPACE?' if not thoughts.turn else ''}"
        rules = f"{marks.until('thoughts_rest', thoughts.close)}SPACE: /[ \\t\\r\\n]{{1,8}}/\n"
        more = f"({marks(thoughts.open.rstrip())} {rest}){'*' if thoughts.opens_anywhere else '?'}"
        if ends_with(prompt_end, thoughts.open):
            more = f"{rest} {more if thoughts.opens_anywhere else ''}"
        return f"start: {more} body\n{rules}"

    def _content(self, marks: Marks, constraint: Constraint) -> str:
        """What stands before the content."""
        thoughts: ThoughtNotation | None = self.format.thoughts
        if thoughts is None or not thoughts.content:
            return ""
        before = marks(thoughts.content)
        if constraint.kind == "JSON schema" and thoughts.json_content:
            return f"({before} | {marks(thoughts.json_content)})"
        return before

    def _calls(self, tools: Sequence[Mapping[str, Any]], marks: Marks, one_call: bool, name: str = "body") -> str:
        calls = self.format.calls
        known = next((one for one, notation in CALLS.items() if notation is calls), None)
        if known is None:
            raise ConfigError("a tool call cannot be forced: this model has no tool calls that are known here")
        rules = call_rules(form_of(known, self.chat_template), marks, f"{name}_made", tools, one=one_call)
        gap = "" if self.format.thoughts is not None and self.format.thoughts.turn else '"\\n"?'
        return f"{name}: {gap} {name}_made\n{rules}"
