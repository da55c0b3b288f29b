"""Answers drawn by a model that knows nothing: every token is as likely, but for a few that end things."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Any

import torch

from hybrimoe_kt.engine.answer import Request, answer
from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.engine.events import Answer
from hybrimoe_kt.engine.sampler import Sampled, Sampler
from hybrimoe_kt.engine.sampling import Sampling

from .scripted import ScriptedEngine

ENDINGS = '"}])</\n'
MARKS = ("</parameter>", "</think>", "</seed:think>", "</\uff5cDSML\uff5cparameter>", "</arg_value>")
"""Texts that are gone on with once they have begun."""


class DrawingEngine(ScriptedEngine):
    """Draws from random logits, in which `liked` texts' bytes and tokens stand out."""

    def __init__(self, *, seed: int = 0, liked: Iterable[str] = ENDINGS, **how: Any) -> None:
        super().__init__(lambda prompt: "", **how)
        self.seed = seed
        ids = {id for text in liked for id in self.tokenizer(text)["input_ids"]}
        self._liked = sorted(ids | set(self.tokenizer.added_tokens_decoder))
        self.drawn: list[int] = []

    def generate(
        self, prompt: list[int], sampling: Sampling, stop: threading.Event, run: dict[str, Any]
    ) -> Generator[Sampled, None, None]:
        self.samplings.append(sampling)
        self.drawn = []
        seeded = replace(sampling, seed=self.seed if sampling.seed is None else sampling.seed)
        matcher = self.vocabulary.matchers(sampling.constraint) if sampling.constraint else None
        ends = self.vocabulary.end_ids
        sample = Sampler(seeded, prompt, ends if sampling.ignore_end else (), matcher)
        generator = torch.Generator().manual_seed(self.seed)
        while len(self.drawn) < sampling.max_new_tokens:
            logits = torch.randn(len(self.tokenizer), generator=generator)
            logits[self._liked] += 2
            logits[self._going_on()] += 30
            sampled = sample(logits)
            if sampled.token in ends:
                return
            self.drawn.append(sampled.token)
            run["new_tokens"] += 1
            yield sampled
            if sample.is_over:
                return
        run["finish"] = "length"

    def _going_on(self) -> list[int]:
        """The bytes after which one mark more would be further on its way."""
        tail = self.tokenizer.decode(self.drawn[-24:])[-16:]
        begun = [(mark, size) for mark in MARKS for size in range(1, len(mark)) if tail.endswith(mark[:size])]
        return [token for mark, size in begun for token in self.tokenizer(mark[size])["input_ids"][:1]]

    def answered(
        self, messages: Any, constraint: Constraint | None, tools: Any = (), forced: Any = (), **how: Any
    ) -> Answer:
        """An answer held to a form, its thoughts and calls told apart."""
        one_call = how.pop("one_call", False)
        vocabulary = self.vocabulary
        prompt = vocabulary.chat_ids(messages, tools or None, how.pop("options", None))
        held = vocabulary.held(prompt, constraint, tools, forced, one_call=one_call)
        sampling = Sampling(**{"max_new_tokens": 1500, "temperature": 1.0, "constraint": held} | how)
        parts = vocabulary.response_parts(prompt, tools)
        request = Request(prompt=prompt, sampling=sampling, parts=parts, one_call=one_call)
        return Answer.of(answer(self, request, threading.Event()))
