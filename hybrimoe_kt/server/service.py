"""What all interfaces share: from a request to its events, with the model behind a queue."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hybrimoe_kt.engine.answer import Request
from hybrimoe_kt.engine.chat.turns import Turns
from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.engine.events import Event, Finished
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.errors import CapacityError, ConfigError, ModelError

from .clients import client_of_request
from .engine import Engine
from .errors import ApiError, as_api_error
from .metrics import Metrics, Tally
from .queue import AnswerQueue, Job, shutting_down
from .settings import Settings

__all__ = ["ChatInput", "Events", "Service"]

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatInput:
    """A conversation as the chat template wants it."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    one_call: bool = False
    forced: Sequence[str] = ()
    """Names of tools, of which the answer must call one, or several unless `one_call`."""


class Events:
    """The events of answers, one after the other as they come; leaving the `async with` ends them where they are."""

    def __init__(self, queue: AnswerQueue, requests: Sequence[Request]) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._queue, self._job = queue, Job(requests, self._emit, client_of_request.get())
        queue.submit(self._job)

    def _emit(self, event: Event | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it whoever asked
            self._job.stop.set()

    async def __aenter__(self) -> Events:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the first request's prompt."""
        return len(self._job.requests[0].prompt)

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self._queue.cancel(self._job)

    async def __aiter__(self) -> AsyncIterator[Event]:
        num_left = len(self._job.requests)
        while num_left:
            event = await self._arrived.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finished) and event.reason == "cancelled":
                raise shutting_down()  # nobody else ends an answer that is still listened to
            num_left -= isinstance(event, Finished)
            yield event


class Service:
    """One model, served."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.model_name = settings.model_name or engine.model_name
        self.tally = Tally()
        self.queue = AnswerQueue(engine, settings.max_waiting, self.tally, max_per_client=settings.max_per_client)
        self.metrics = Metrics(engine, self.queue, self.tally)
        self.is_shutting_down = False
        self._tokenizing = asyncio.Lock()  # tokenizers are not made for several threads

    @property
    def max_request_bytes(self) -> int:
        """Longest request body taken."""
        return self.settings.max_request_bytes or 2**20 + 128 * self.engine.context_tokens

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for a model that is not the one served."""
        if name is not None and name.removesuffix(":latest") != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist here, the one served is {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    @property
    def takes_tools(self) -> bool:
        """Whether chat template and notation of this model have tool calls."""
        return self.engine.vocabulary.takes_tools

    def _check_chat(self, given: ChatInput, sampling: Sampling | None = None) -> None:
        if given.tools and not self.takes_tools:
            raise ApiError(
                400, f"the model {self.model_name!r} has no tool calls that are known here; leave out tools",
                param="tools", code="unsupported_parameter",
            )  # fmt: skip
        for name in given.template_options:
            if not self.engine.vocabulary.takes(name):
                raise ApiError(
                    400, f"this model's chat template has no option {name!r}",
                    param="chat_template_kwargs", code="unsupported_parameter",
                )  # fmt: skip
        said = "" if sampling is None else _text_of(sampling)
        _check_text([given.messages, given.tools, given.template_options, said])

    async def chat(self, given: ChatInput, sampling: Sampling, stops: Sequence[str], num_answers: int = 1) -> Events:
        """Begin to answer a conversation, `num_answers` times."""
        self._check_chat(given, sampling)
        vocabulary = self.engine.vocabulary

        def made() -> tuple[list[int], Turns]:
            prompt = vocabulary.chat_ids(given.messages, given.tools or None, given.template_options)
            return prompt, vocabulary.turns_of(prompt, given.messages, given.tools, given.template_options)

        prompt, turns = await self._tokens(made)
        sampling = await self._held(
            sampling,
            lambda: vocabulary.held(
                prompt, sampling.constraint, given.tools, tuple(given.forced), one_call=given.one_call
            ),
            "tool_choice" if given.forced else "response_format",
        )
        requests = [
            Request(
                prompt=prompt,
                sampling=one,
                stop_strings=tuple(stops),
                parts=vocabulary.response_parts(prompt, given.tools),
                one_call=given.one_call,
                turns=turns,
            )
            for one in _each(sampling, num_answers)
        ]
        return self._begin(requests, "messages")

    async def num_chat_tokens(self, given: ChatInput) -> int:
        """How many tokens a conversation has as `chat` reads it."""
        self._check_chat(given)
        read = self.engine.vocabulary.chat_ids
        return len(await self._tokens(lambda: read(given.messages, given.tools or None, given.template_options)))

    async def num_text_tokens(self, text: str) -> int:
        """How many tokens a piece of an answer has."""
        empty = await self._ids("")  # of which some tokenizers make a token
        return len(await self._ids(text)) - len(empty) if text else 0

    async def complete(
        self, prompts: Sequence[str | list[int]], sampling: Sampling, stops: Sequence[str], num_answers: int = 1
    ) -> Events:
        """Begin to go on with texts, or with token ids: `num_answers` to each, in their order."""
        _check_text([prompts, _text_of(sampling)])
        sampling = await self._held(sampling, lambda: sampling.constraint, "response_format")
        requests = [
            Request(prompt=tokens, sampling=one, stop_strings=tuple(stops))
            for tokens in [await self._ids(prompt) for prompt in prompts]
            for one in _each(sampling, num_answers)
        ]
        return self._begin(requests, "prompt")

    async def _held(self, sampling: Sampling, form: Callable[[], Constraint | None], param: str) -> Sampling:
        """Return how to draw an answer of a form, once that has been compiled; ApiError where it cannot be."""

        def compiled() -> Constraint | None:
            if (constraint := form()) is not None:
                self.engine.vocabulary.matchers(constraint)
            return constraint

        async with self._tokenizing:  # of tokens' bytes the tokenizer tells
            try:
                return replace(sampling, constraint=await asyncio.to_thread(compiled))
            except ConfigError as error:
                raise ApiError(400, str(error), param=param, code="unsupported_parameter") from None

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._tokens(lambda: self.engine.vocabulary.text_ids(prompt))
        return prompt

    async def text_of(self, prompt: str | list[int]) -> str:
        """The text of a prompt given in either way; special tokens are written out."""
        if isinstance(prompt, str):
            return prompt
        async with self._tokenizing:
            return await asyncio.to_thread(self.engine.vocabulary.text_of_all, prompt)

    def _begin(self, requests: Sequence[Request], param: str) -> Events:
        if self.is_shutting_down:
            raise shutting_down()
        for request in requests:
            self._check(request, param)
        return Events(self.queue, requests)

    def _check(self, request: Request, param: str) -> None:
        size = self.engine.vocabulary.size
        if any(not 0 <= token < size for token in request.sampling.logit_bias):
            raise ApiError(400, f"logit_bias names tokens from 0 to {size - 1}", param="logit_bias")
        if not request.prompt:
            raise ApiError(400, "the prompt is empty", param=param)
        try:
            self.engine.check_length(request.prompt)
        except CapacityError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
        except ModelError as error:
            raise ApiError(400, str(error), param=param) from None

    async def _tokens(self, tokenize: Callable[[], _T]) -> _T:
        async with self._tokenizing:
            try:
                return await asyncio.to_thread(tokenize)
            except Exception as error:
                raise as_api_error(error) from None

    def longest_answer(self, wanted: int | None) -> int:
        """Tokens an answer may have at most: what is asked for, below 0 all, within what the server allows."""
        limits = [limit for limit in (wanted, self.settings.max_new_tokens) if limit is not None and limit >= 0]
        return min(limits, default=self.engine.context_tokens)

    def penalty_window(self, wanted: int | None) -> int:
        """Tokens that penalties count as llama.cpp does, whose own default is 64."""
        if wanted is None:
            return 64
        return self.engine.context_tokens if wanted < 0 else wanted


def _text_of(sampling: Sampling) -> str:
    return sampling.constraint.text if sampling.constraint is not None else ""


def _each(sampling: Sampling, num_answers: int) -> Iterator[Sampling]:
    """How each of several answers to one prompt is drawn: by seeds that follow each other."""
    for number in range(num_answers):
        if sampling.seed is None or sampling.seed < 0:
            yield sampling
        else:
            yield replace(sampling, seed=(sampling.seed + number) % 2**63)


def _check_text(content: Any) -> None:
    """ApiError for text that JSON can spell and no tokenizer takes."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "a text holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply") from None


async def unless_gone(receive: Callable[[], Awaitable[Mapping[str, Any]]], work: Awaitable[_T]) -> _T | None:
    """Return what `work` does, or None and `work` cancelled when the client closes its connection before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_gone(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
