"""Text in, text out: conversations, completions, streaming, and what was counted on the way."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.hf.loading import LoadedModel
from hybrimoe_kt.host.tokenizers.file_vocabulary import end_ids

from .answer import Request, answer
from .events import Answer, Event, TextDelta
from .facts import Counters, ModelInfo
from .forms.token_matcher import TokenMatcher
from .memory.conversation import Conversation
from .sampling import Sampling
from .steps.profiler import TimeShares
from .token_generator import Run, TokenGenerator
from .vocabulary import Message, Vocabulary

__all__ = ["Engine", "Run", "Sampling"]


class Engine(TokenGenerator):
    """A loaded model that answers.

    Not for several threads at once; only a `stop` event may be set from another. Conversations are kept in a memory
    budget, and a prompt that begins like one of them is computed from where it differs. Nothing needs closing: what
    nobody refers to, Python's garbage collector gives back, also an accelerator's memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_tokens: int | None = None,
        shares: TimeShares | None = None,
        captures: bool | None = None,
        parallel: int = 1,
        cache_ram: int | None = None,
    ) -> None:
        """`context_tokens` limits prompt and answer together; by default the model's own limit.

        `parallel` answers at once share its steps; `cache_ram` as of `TokenGenerator`, `captures` as of
        `captured_loop`.
        """
        ends = loaded.model.config.eos_token_id
        known = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
        known |= end_ids(loaded.loader.file.metadata, tokenizer.added_tokens_encoder)
        super().__init__(
            loaded, known - {None}, context_tokens=context_tokens, shares=shares, captures=captures, parallel=parallel,
            cache_ram=cache_ram,
        )  # fmt: skip
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer, loaded.model, self.end_ids)
        self.vocabulary.finds_leads = not Conversation(self.new_cache()).is_croppable

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        template_options: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Answer a conversation, or one message given as text; the answer's thoughts and tool calls are told apart.

        A message has a `role` and `content`; `tools` are functions in OpenAI's notation, `template_options` what else
        the model's chat template reads. The answer ends before the first complete one of `stop_strings`, and between
        two tokens once `stop` is set. Raises CapacityError for what the context cannot hold, ConfigError for tools and
        options that this model does not know, ModelError when its chat template refuses the conversation.
        """
        request = self._chat_request(messages, sampling, stop_strings, tools, template_options)
        return Answer.of(answer(self, request, stop or threading.Event()))

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        stop: threading.Event | None = None,
    ) -> Answer:
        """Go on with a text, or with token ids, as it stands: without chat template, thoughts or tool calls.

        Raises CapacityError for an empty prompt or one the context cannot hold, ModelError for a token id that the
        model does not have.
        """
        tokens = self.vocabulary.text_ids(prompt) if isinstance(prompt, str) else list(prompt)
        request = Request(prompt=tokens, sampling=sampling or Sampling(), stop_strings=tuple(stop_strings))
        self.check_length(request.prompt)
        return Answer.of(answer(self, request, stop or threading.Event()))

    def stream(
        self,
        messages: str | Sequence[Message],
        *,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        template_options: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
        as_written: bool = False,
    ) -> Generator[str, None, None]:
        """Yield the text of `chat`'s answer piece by piece, thoughts left out; errors as there, before the first piece.

        A piece never ends within a character. `as_written` yields all that the model writes, its thoughts too, these
        between `<think>` and `</think>` whatever marks it has for them.
        Closing the iterator ends the answer; `last_run` tells what it took.
        """
        request = self._chat_request(messages, sampling, stop_strings, (), template_options, as_written=as_written)
        events = answer(self, request, stop or threading.Event())
        return _with_thoughts(events) if as_written and request.parts is not None else _texts(events)

    def matcher(self, sampling: Sampling) -> TokenMatcher | None:
        """What holds an answer to `sampling.constraint`; ConfigError for a constraint that cannot be followed."""
        return self.vocabulary.matchers(sampling.constraint) if sampling.constraint is not None else None

    def _chat_request(
        self,
        messages: str | Sequence[Message],
        sampling: Sampling | None,
        stop_strings: Sequence[str],
        tools: Sequence[Mapping[str, Any]],
        template_options: Mapping[str, Any] | None,
        *,
        as_written: bool = False,
    ) -> Request:
        vocabulary = self.vocabulary
        if tools and not vocabulary.takes_tools:
            raise ConfigError(f"{self.model_name!r} has no tool calls that are known here; leave out tools")
        for name in template_options or {}:
            if not vocabulary.takes(name):
                raise ConfigError(f"the chat template of {self.model_name!r} has no option {name!r}; leave it out")
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        prompt = vocabulary.chat_ids(given, tools or None, template_options)
        turns = vocabulary.turns_of(prompt, given, tools, template_options)
        self.check_length(prompt)
        parts = None if as_written and vocabulary.writes_think else vocabulary.response_parts(prompt, tools)
        sampling = sampling or Sampling()
        sampling = replace(sampling, constraint=vocabulary.held(prompt, sampling.constraint, tools))
        return Request(prompt=prompt, sampling=sampling, stop_strings=tuple(stop_strings), parts=parts, turns=turns)

    def info(self) -> ModelInfo:
        """What the model is."""
        config = self.model.config
        return ModelInfo(
            architecture=str(config.model_type),
            hidden_size=int(config.hidden_size),
            num_layers=int(config.num_hidden_layers),
            expert_bytes=self.runtime.store.num_bytes,
        )

    def counters(self) -> Counters:
        """What was counted since the model was loaded. May be called from any thread, also during an answer."""
        runtime, coordinator = self.runtime, self.runtime.coordinator
        statistics = runtime.statistics()  # first: it waits for what was counted on a device
        heat, last = coordinator.heat(), coordinator.last_token()
        return Counters(
            accelerators=tuple(accelerator.name for accelerator in runtime.accelerators),
            health=runtime.health(),
            statistics=statistics,
            hits=heat["hits"],
            misses=heat["misses"],
            last_hits=last["hits"],
            last_misses=last["misses"],
            seconds=self.seconds(),
            busy=runtime.busy_shares(),
            kept={"conversations": len(self.kept), "bytes": self.kept.num_bytes},
        )

    def statistics(self) -> dict[str, Any]:
        """Everything counted since the model was loaded."""
        stats = self.runtime.statistics()
        return {
            "model": self.model_name,
            "context_tokens": self.context_tokens,
            "runtime": self.runtime.describe(),
            "health": self.runtime.health().as_dict(),
        } | stats


def _texts(events: Generator[Event, None, None]) -> Generator[str, None, None]:
    with closing(events):
        for event in events:
            if isinstance(event, TextDelta) and event.text and not event.is_thought:
                yield event.text


def _with_thoughts(events: Generator[Event, None, None]) -> Generator[str, None, None]:
    """All that is said, thoughts between marks."""
    thinks = False
    with closing(events):
        for event in events:
            if isinstance(event, TextDelta) and event.text:
                if event.is_thought != thinks:
                    yield "<think>\n" if event.is_thought else "\n</think>\n\n"
                thinks = event.is_thought
                yield event.text
    if thinks:
        yield "\n</think>\n\n"
