"""Between text and token ids, the way one model wants it: its tokenizer, chat template and notation of answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .chat.chat_template import answer_beginning, chat_prompt, template_takes
from .chat.response_format import PREFIX_TOKENS, ResponseFormat, response_format
from .chat.response_parts import ResponseParts
from .chat.turns import Leads, Turns
from .constraint import Constraint
from .forms.answer_forms import AnswerForms
from .forms.token_matcher import TokenMatchers
from .text.detokenizer import IncrementalDetokenizer
from .text.spelling import Spelling
from .text.token_bytes import TokenBytes

__all__ = ["Message", "Vocabulary", "num_token_ids"]

Message = Mapping[str, Any]
"""What a chat template reads of one message: `role` ("system", "user", "assistant", "tool"), `content`, ...

The content is a text or a list of parts `{"type": "text", "text": ...}`, whichever of the two the template reads.
"""


def num_token_ids(model: PreTrainedModel) -> int:
    """How many token ids a model has an embedding for; its tokenizer may know fewer."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


class Vocabulary:
    """A model's words. Not for several threads at once, as tokenizers are not."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, end_ids: Collection[int] | None = None
    ) -> None:
        """`end_ids` end an answer, by default the tokenizer's one."""
        self._tokenizer, self._model = tokenizer, model
        self.end_ids = frozenset([tokenizer.eos_token_id] if end_ids is None else end_ids)
        self._leads, self.finds_leads = Leads(self.chat_ids), False
        """Whether to find where system messages end, at the price of two more such prompts for each."""
        self.default_options: Mapping[str, Any] = {}
        """What the chat template reads where a conversation comes without."""

    @property
    def size(self) -> int:
        """Token ids the model has, counted from 0."""
        return num_token_ids(self._model)

    @property
    def chat_template(self) -> str:
        """The Jinja template of conversations, empty where there is none."""
        return str(self._tokenizer.chat_template or "")

    def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the answer; ModelError when the chat template refuses it."""
        options = {**self.default_options, **(template_options or {})}
        return chat_prompt(self._tokenizer, messages, tools, options, calls=self._format.calls)

    def turns_of(
        self,
        prompt: Sequence[int],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Turns:
        """Where turns begin in the prompt that `chat_ids` made of these, as far as the template tells."""
        options = {**self.default_options, **(template_options or {})}
        begun = answer_beginning(self._tokenizer, options)
        ends_so = bool(begun) and list(prompt[-len(begun) :]) == begun
        lead = self._leads.length(prompt, messages, tools or None, template_options) if self.finds_leads else 0
        return Turns(lead, len(prompt) - len(begun) if ends_so else 0)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a plain text that the model is to go on with."""
        return list(self._tokenizer(text)["input_ids"])

    def text_of(self, token: int) -> str:
        """The text of a single token; U+FFFD stands in it for a part of a character."""
        return str(self._tokenizer.decode([token]))

    def text_of_all(self, tokens: Sequence[int]) -> str:
        """The text of tokens from the beginning of one on, special ones written out."""
        return str(self._tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False))

    def spelling(self) -> Spelling:
        """Return what tells where in a text each of its tokens stands."""
        return Spelling(self.bytes_of)

    @cached_property
    def bytes_of(self) -> TokenBytes:
        """What tells the bytes of a single token."""
        return TokenBytes(self._tokenizer)

    @cached_property
    def matchers(self) -> TokenMatchers:
        """What compiles the forms that answers are held to. May be asked from any thread."""
        return TokenMatchers(self.size, TokenBytes(self._tokenizer), self.end_ids)

    def detokenizer(self, *, keep_special: bool | Collection[str] = False) -> IncrementalDetokenizer:
        """Return what turns an answer's tokens into text as they come; `keep_special` as there."""
        return IncrementalDetokenizer(self._tokenizer.backend_tokenizer, keep_special=keep_special)

    def takes(self, option: str) -> bool:
        """Whether the chat template reads a variable; one that it does not read would be dropped silently."""
        return template_takes(self._tokenizer, option)

    @property
    def writes_think(self) -> bool:
        """Whether thoughts, where there are any, stand between `<think>` and `</think>`."""
        return self._format.writes_think

    @property
    def takes_tools(self) -> bool:
        """Whether both the chat template and the notation of answers have tool calls."""
        return self._format.has_calls and (self.takes("tools") or self._format.describes_tools)

    def response_parts(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]] = ()) -> ResponseParts | None:
        """What splits thoughts and calls of `tools` off the answer to `prompt`; None where no notation is known."""
        return self._format.parts(self._tokenizer, prompt, tools)

    def held(
        self,
        prompt: Sequence[int],
        constraint: Constraint | None,
        tools: Sequence[Mapping[str, Any]] = (),
        forced: Collection[str] = (),
        *,
        one_call: bool = False,
    ) -> Constraint | None:
        """Return what the whole answer to `prompt` is held to, its thoughts included; None where it is free.

        Arguments as of `AnswerForms.held`. ConfigError for what this model's notation does not allow.
        """
        bytes_of = self.bytes_of
        special = {
            added.content: token
            for token, added in self._tokenizer.added_tokens_decoder.items()
            if bytes_of.is_special(token) or token in self.end_ids
        }
        forms = AnswerForms(self._format, self.chat_template, special, self.end_ids)
        prompt_end = str(self._tokenizer.decode(list(prompt[-PREFIX_TOKENS:])))
        return forms.held(prompt_end, constraint, tools, forced, one_call=one_call)

    @property
    def _format(self) -> ResponseFormat:
        return response_format(self._tokenizer, self._model)
