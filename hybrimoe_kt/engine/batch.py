"""Several answers at once: who is admitted, whose prompt is read, who steps, and who leaves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from hybrimoe_kt.device.step_graph import CaptureError, StepLost
from hybrimoe_kt.device.unused_memory import is_out_of_memory
from hybrimoe_kt.errors import CapacityError, KernelError

from .generation import Generation
from .memory.conversation import Conversation
from .memory.prefix_cache import PrefixCache
from .steps.joint_rows import leave_rows
from .steps.model_steps import BROKEN, MOST_LOST, ModelSteps, short_reason

__all__ = ["Batch"]

_SHARED_CHUNK_TOKENS = 512
"""Longest piece of a prompt that is read while others wait for their next token: a choice between their patience and
the prompt's, which is read the quicker the longer its pieces are."""


class Batch:
    """Answers generations side by side, each admitted in the order they came.

    A step reads a piece of one prompt, or gives every answer its next token; they take turns while there is both. An
    answer ends as it would alone. Not for several threads at once.
    """

    def __init__(
        self,
        steps: ModelSteps,
        kept: PrefixCache,
        *,
        most: int,
        most_tokens: int,
        on_end: Callable[[Generation], None] = lambda generation: None,
    ) -> None:
        """At most `most` at a time, with `most_tokens` of prompts and answers together; `on_end` hears of each."""
        self._steps, self._kept, self.most = steps, kept, most
        self.most_tokens = most_tokens
        self._on_end = on_end
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        """By arrival: the first one is never set aside."""
        self._has_read = False
        self._num_lost = 0
        self.num_set_aside = 0
        """Answers that had to wait for room in the middle, since the start."""

    @property
    def most_tokens(self) -> int:
        """Of prompts and answers that there is memory for."""
        return self._steps.most_tokens

    @most_tokens.setter
    def most_tokens(self, tokens: int) -> None:
        self._steps.most_tokens = self._kept.most_live_tokens = tokens

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_answering(self) -> int:
        """Those whose prompts have been read."""
        return sum(not generation.is_reading for generation in self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Of prompts and answers that are held."""
        return sum(len(generation.ids) for generation in self._running)

    def add(self, generation: Generation) -> None:
        """Let it wait for its turn; nothing is computed before `step`."""
        self._waiting.append(generation)

    def drop(self, generation: Generation, finish: str = "cancelled") -> None:
        """End one of which nobody wants more; what it has held is kept."""
        if not generation.is_over:
            self._end(generation, finish)

    def step(self) -> None:
        """Bring those that were added on by one step, where there are any.

        What a failure ends is in the generations' `error`. Anything else that is raised has ended all of them.
        """
        for generation in [*self._waiting, *self._running]:
            if generation.stop.is_set() and not generation.is_over:
                self._end(generation, "cancelled")
        self._admit()
        try:
            self._advance()
        except BaseException as error:
            for generation in list(self._running):
                self._end(generation, "error", error if isinstance(error, Exception) else None)
            raise

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.most:
            first = self._waiting[0]
            if self._running and self._num_needed([first], more=1) > self.most_tokens:
                return
            self._running.append(self._waiting.popleft())

    def _num_needed(self, beside: Sequence[Generation] = (), *, more: int = 0) -> int:
        """Tokens there has to be memory for, with `more` for each of those that run and those `beside`."""
        return self._steps.memory_tokens([len(generation.ids) + more for generation in (*self._running, *beside)])

    def _advance(self) -> None:
        reading = next((generation for generation in self._running if generation.is_reading), None)
        answering = [generation for generation in self._running if not generation.is_reading]
        if reading is not None and not (self._has_read and answering):
            self._has_read = True
            self._read(reading, is_alone=not answering)
        elif answering:
            self._has_read = False
            self._answer(self._with_room(answering))

    def _read(self, generation: Generation, *, is_alone: bool) -> None:
        """Compute one piece of a prompt, or of what is computed again; with the last one the next token comes."""
        if generation.conversation is None:
            is_new = generation.scores is not None
            needed = self._num_needed()
            generation.begin(self._kept.new(needed) if is_new else self._kept.take(generation.ids, needed))
        conversation = generation.conversation
        assert conversation is not None, "given one"
        left, size = generation.left, self._steps.runtime.options.max_chunk_tokens
        if not is_alone:
            size = min(size, _SHARED_CHUNK_TOKENS)
        if not conversation.is_croppable:
            ahead = [length - len(conversation.ids) for length in generation.turns]
            size = min([size, *(length for length in ahead if length > 0)])
        self._append(generation, conversation, left[:size])
        if len(conversation.ids) in generation.turns:
            conversation.mark(generation.turns.lead)

    def _append(self, generation: Generation, conversation: Conversation, ids: Sequence[int]) -> None:
        try:
            logits = self._steps.append(conversation, ids, scores=generation.scores)
        except Exception as error:
            self._end(generation, "error", error)
            return
        if len(conversation.ids) == len(generation.ids):
            self._draw(generation, logits)

    def _draw(self, generation: Generation, logits: torch.Tensor) -> None:
        try:
            generation.receive(logits)
        except Exception as error:  # a form that cannot be followed any further, say
            self._end(generation, "error", error)
            return
        if generation.is_over:
            self._end(generation, generation.run.finish)

    def _answer(self, answering: Sequence[Generation]) -> None:
        """Give each its next token."""
        if len(answering) == 1:
            (generation,) = answering
            assert generation.conversation is not None, "its prompt is read"
            self._append(generation, generation.conversation, generation.left)
            return
        conversations = [one.conversation for one in answering if one.conversation is not None]
        reason = ""
        try:
            logits = self._steps.together(conversations, [one.ids[-1] for one in answering])
        except CaptureError as refused:
            self._steps.capture_no_more(refused)
        except StepLost as lost:
            self._num_lost += 1
            if self._num_lost > MOST_LOST:
                raise KernelError(str(lost)) from lost
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = short_reason(error)
        else:
            self._num_lost = 0
            if logits is None:
                for generation, conversation in zip(answering, conversations, strict=True):
                    self._append(generation, conversation, generation.left)
                return
            is_finite = bool(logits.sum().isfinite())
            for generation, row in zip(answering, logits.unbind(), strict=True):
                if is_finite or row.sum().isfinite():
                    self._draw(generation, row)
                else:
                    self._end(generation, "error", KernelError(BROKEN), holds=False)
            return
        for conversation in conversations:  # not above: the error's frames hold what the failed step allocated
            self._steps.begin_anew(conversation)
        if not reason:
            return
        try:
            self._steps.make_room(reason, sum(len(one.ids) for one in answering))
        except CapacityError as full:  # the others are computed again, with its room
            self._end(answering[-1], "error", full)

    def _with_room(self, answering: list[Generation]) -> list[Generation]:
        """Those that step now; the ones that came last are set aside where there is no room for all."""
        while len(self._running) > 1 and self._num_needed(more=1) > self.most_tokens:
            last = self._running.pop()
            if last in answering:
                answering.remove(last)
            if last.conversation is not None:
                self._leave(last, last.conversation)
            self._waiting.appendleft(last)
            self.num_set_aside += 1
        self._kept.hold(self._num_needed(more=1))
        return answering

    def _leave(self, generation: Generation, conversation: Conversation, *, holds: bool = True) -> None:
        """Keep what it has held for a prompt that begins so."""
        generation.conversation = None
        if not holds or not conversation.ids:
            self._kept.drop(conversation)
            return
        leave_rows(conversation.cache)
        conversation.num_before = generation.turns.answer or len(generation.prompt) - 1
        self._kept.put(conversation)

    def _end(self, generation: Generation, finish: str, error: Exception | None = None, *, holds: bool = True) -> None:
        generation.end(finish, error)
        if generation in self._running:
            self._running.remove(generation)
        if generation in self._waiting:
            self._waiting.remove(generation)
        if generation.conversation is not None:
            self._leave(generation, generation.conversation, holds=holds)
        if not self._running:
            self._steps.rest()
        self._on_end(generation)
