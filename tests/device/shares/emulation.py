"""A device's thread, the service's and a main one, on real memory, disturbed at every step as a seed says.

The device walks through tokens and layers as a stream does: it posts, waits, copies the outbox. Each answer is a
function of layer, hidden states, ids and weights, so that one that is wrong, stale or torn shows. `play` returns what
happened; a wait longer than `HANG_S` is a hang.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.shares.service import ShareService
from hybrimoe_kt.device.shares.words import SharePosts, naive_post
from hybrimoe_kt.device.waiting import SPIN_S, Deadline
from hybrimoe_kt.errors import DeadlineError, KernelError

HIDDEN, TOP_K, LAYERS = 16, 3, (0, 2, 3, 7)
HANG_S = 10.0
DEADLINE_S = 0.05
"""Where a deadline is to pass; else nothing takes as long as `HANG_S`."""

Fault = Literal["", "raise", "hang", "slow", "stall", "stop", "release", "bound"]
FAULTS: tuple[Fault, ...] = ("", "raise", "hang", "slow", "stall", "stop", "release", "bound")
"""None; of the backend, which raises, comes back late or much too late; of the device, which stands still; a service
stopped, or released, in the middle; a wait that ends itself before the word is there."""


class Disturber:
    """Yields, sleeps, or does nothing at a point; each thread draws for itself."""

    def __init__(self, seed: int) -> None:
        self._seed, self._own, self._num = seed, threading.local(), 0

    def __call__(self) -> None:
        if not hasattr(self._own, "draw"):
            self._num += 1
            self._own.draw = random.Random(self._seed * 1000 + self._num)
        kind = self._own.draw.random()
        if kind < 0.15:
            time.sleep(self._own.draw.random() * 100e-6)
        elif kind < 0.4:
            time.sleep(0)


class DisturbedPosts(SharePosts):
    """Each step of either side takes its time; memory is written in halves."""

    def __init__(self, disturb: Callable[[], None], *, answers_pairs: bool, dtype: torch.dtype) -> None:
        super().__init__(
            ImmediateAccelerator(),
            LAYERS,
            hidden=HIDDEN,
            hidden_dtype=dtype,
            top_k=TOP_K,
            answers_pairs=answers_pairs,
        )
        self.disturb = disturb

    def read_inbox(self, hidden: torch.Tensor) -> tuple[list[int], Sequence[float]]:
        self.disturb()
        return super().read_inbox(hidden)

    def write_outbox(self, answer: torch.Tensor | None) -> None:
        flat = self.outbox.view(-1)
        given = torch.zeros(flat.shape) if answer is None else answer.reshape(-1)
        for part in (slice(0, len(flat) // 2), slice(len(flat) // 2, None)):
            self.disturb()
            flat[part].copy_(given[part])
        self.disturb()

    def clear_asked(self, place: int) -> None:
        super().clear_asked(place)
        self.disturb()

    def set_done(self, place: int) -> None:
        super().set_done(place)
        self.disturb()

    def write_inbox(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        for target, source in ((self.hidden, hidden), (self.ids, ids), (self.weights, weights)):
            target[:1].copy_(source[:1])
            self.disturb()
            target[1:].copy_(source[1:])

    def clear_done(self, place: int) -> None:
        self.disturb()
        super().clear_done(place)
        self.disturb()

    def set_asked(self, place: int) -> None:
        super().set_asked(place)
        self.disturb()


def wanted(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, pairs: bool) -> torch.Tensor:
    """What the CPU is to answer; whole numbers, so that sums are exact in any order."""
    found = torch.zeros(TOP_K, HIDDEN)
    for place in range(len(ids)):
        if ids[place] >= 0:
            found[place] = (hidden.float() * (int(ids[place]) + 1) + layer) * weights[place]
    return found if pairs else found.sum(0)


class TestedCpu(CpuBackend):
    """Computes in the calling thread, or in one of its own; fails at a call as it is told."""

    name = "emulated"

    def __init__(self, seed: int, disturb: Callable[[], None], fault: Fault, at: int, *, answers_pairs: bool) -> None:
        self.answers_pairs = answers_pairs
        draw = random.Random(seed)
        self._submits = draw.random() < 0.5
        self._disturb, self._fault, self._at = disturb, fault, at
        self._lateness_s = DEADLINE_S * draw.uniform(1.2, 2.0)
        self.back, self.struck = threading.Event(), False
        """Lets a hanging call come back."""
        self.num_calls, self._answer, self._thread = 0, torch.empty(0), None

    def add_layer(self, experts: Any) -> None: ...

    def compute(self, layer: int, routed: Routed) -> torch.Tensor | None:
        return None if self._submits else self._computed(layer, routed)

    def submit(self, layer: int, routed: Routed) -> None:
        if self._fault == "raise" and self.num_calls == self._at:
            self._computed(layer, routed)

        def work() -> None:
            self._answer = self._computed(layer, routed)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        assert self._thread is not None
        return not self._thread.is_alive()

    def wait(self) -> torch.Tensor:
        return self._answer

    def _computed(self, layer: int, routed: Routed) -> torch.Tensor:
        call, self.num_calls = self.num_calls, self.num_calls + 1
        self._disturb()
        answer = wanted(layer, routed.hidden[0], routed.ids[0], routed.weights[0], pairs=self.answers_pairs)[None]
        if call == self._at and self._fault in ("raise", "hang", "slow"):
            self.struck = True
            if self._fault == "raise":
                raise RuntimeError("the backend is broken")
            if self._fault == "hang":
                self.back.wait(HANG_S)
            else:
                time.sleep(self._lateness_s)
        self._disturb()
        return answer


@dataclass
class Outcome:
    """Of one seed: what must not be, and what was."""

    wrong: list[str] = field(default_factory=list)
    """Answers taken for right that were not."""
    hangs: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Faults that did not end as ordinary failures, or failures without a fault."""
    num_tokens: int = 0
    num_asked: int = 0
    num_failed: int = 0
    num_dead: int = 0
    num_late: int = 0
    """Tokens without a fault that took longer than a short deadline, as machines do."""
    struck: bool = False

    @property
    def is_right(self) -> bool:
        return not (self.wrong or self.hangs or self.complaints)


@dataclass(frozen=True)
class Mutation:
    """What is changed about posts, service and device, so that the check has something to find."""

    posts: type[DisturbedPosts] = DisturbedPosts
    service: type[ShareService] = ShareService
    is_hasty: bool = False
    hang_s: float = HANG_S


class Device(threading.Thread):
    """The stream: a token whenever it is given one."""

    def __init__(self, seed: int, posts: DisturbedPosts, outcome: Outcome, mutation: Mutation) -> None:
        super().__init__(daemon=True)
        self._draw, self._posts, self._outcome = random.Random(seed), posts, outcome
        self._is_hasty, self._hang_s = mutation.is_hasty, mutation.hang_s
        self.go, self.ended, self.is_over = threading.Semaphore(0), threading.Event(), False
        self.stalls_at, self.mistakes = -1, list[str]()
        self.stall_s, self.gives_up_at = 0.0, -1

    def run(self) -> None:
        with torch.inference_mode():
            while True:
                self.go.acquire()
                if self.is_over:
                    return
                for place, layer in enumerate(LAYERS):
                    self._step(place, layer)
                self.ended.set()

    def _step(self, place: int, layer: int) -> None:
        posts, draw = self._posts, self._draw
        hidden = torch.tensor([draw.randrange(-50, 50) for _ in range(HIDDEN)], dtype=posts.hidden.dtype)
        weights = torch.tensor([float(draw.randrange(1, 9)) for _ in range(TOP_K)])
        ids = torch.tensor(draw.sample(range(8), TOP_K))
        ids[torch.tensor([draw.random() < 0.45 for _ in range(TOP_K)])] = -1
        stalls = self.stalls_at == place
        if stalls and draw.random() < 0.5:
            time.sleep(self.stall_s)
            stalls = False
        naive_post(posts, layer, hidden, ids, weights)
        if stalls:
            time.sleep(self.stall_s)
        posts.disturb()
        halves = []
        if self._is_hasty:  # a mutant: half of the outbox before the wait
            halves.append(posts.outbox.view(-1)[: posts.outbox.numel() // 2].clone())
        end = time.perf_counter() + self._hang_s
        while not posts.is_done(place):
            if self.gives_up_at == place or posts.has_timed_out:
                posts.time_out()
                break
            time.sleep(1e-5)
            if time.perf_counter() > end:
                self._outcome.hangs.append(f"layer {layer} is waited for")
                posts.set_done(place)
        posts.disturb()
        if not halves:
            halves.append(posts.outbox.view(-1)[: posts.outbox.numel() // 2].clone())
        posts.disturb()
        halves.append(posts.outbox.view(-1)[posts.outbox.numel() // 2 :].clone())
        if bool((ids >= 0).any()):
            self._outcome.num_asked += 1
            right = wanted(layer, hidden, ids, weights, pairs=posts.answers_pairs)
            if not torch.equal(torch.cat(halves), right.view(-1)):
                self.mistakes.append(f"layer {layer}")


def play(seed: int, mutation: Mutation | None = None, fault: Fault | None = None, tokens: int = 4) -> Outcome:
    """Play some tokens under one fault at most, the seed's unless it is named, and a new service after a death."""
    draw, outcome, disturb = random.Random(seed), Outcome(), Disturber(seed)
    mutation = mutation or Mutation()
    kind = draw.choice(FAULTS) if fault is None else fault
    pairs, dtype = draw.random() < 0.3, draw.choice((torch.float32, torch.bfloat16, torch.float16))
    posts = mutation.posts(disturb, answers_pairs=pairs, dtype=dtype)
    at = draw.randrange(2 * len(LAYERS))
    deadline = Deadline(DEADLINE_S if kind in ("hang", "slow", "stall") else mutation.hang_s)
    backends = [TestedCpu(seed, disturb, kind, at, answers_pairs=pairs)]
    service = mutation.service(posts, backends[0], deadline)
    service._spin_s = draw.choice((0.0, SPIN_S))
    device = Device(seed + 1, posts, outcome, mutation)
    device.start()
    struck_token = draw.randrange(tokens - 1)
    delay_s = draw.uniform(0, 3e-3)
    try:
        for token in range(tokens):
            is_struck = token == struck_token and kind in ("stall", "stop", "release")
            device.stalls_at = draw.randrange(len(LAYERS)) if is_struck and kind == "stall" else -1
            device.stall_s = DEADLINE_S * 1.5
            gives_up = token == struck_token and kind == "bound"
            device.gives_up_at = draw.randrange(len(LAYERS)) if gives_up else -1
            already = backends[-1].struck
            device.mistakes.clear()
            device.ended.clear()
            began = time.perf_counter()
            service.open()
            device.go.release()
            if is_struck and kind != "stall":
                time.sleep(delay_s)
                service.release() if kind == "release" else service.stop()
            _wait_for_end(device, service, deadline, outcome)
            is_struck |= posts.has_timed_out
            service.close_step()
            failure, seconds = service.failure(), time.perf_counter() - began
            outcome.num_tokens += 1
            is_struck |= backends[-1].struck and not already
            _judge(outcome, f"seed {seed} token {token} {kind}", failure, device.mistakes, is_struck, seconds, deadline)
            outcome.struck |= is_struck
            if service.is_dead or (is_struck and kind == "stop"):
                outcome.num_dead += service.is_dead
                _refuses(service, outcome)
                if draw.random() < 0.7:
                    threading.Timer(draw.uniform(0, 2e-3), backends[-1].back.set).start()
                backends.append(TestedCpu(seed + 7, disturb, "", -1, answers_pairs=pairs))
                service = mutation.service(posts, backends[-1], deadline)
            if outcome.hangs:
                break
    finally:
        for backend in backends:
            backend.back.set()
        service.stop()
        device.is_over = True
        device.go.release()
        device.join(HANG_S)
    return outcome


def _wait_for_end(device: Device, service: ShareService, deadline: Deadline, outcome: Outcome) -> None:
    try:
        deadline.wait(device.ended.is_set, "the token")
    except DeadlineError:
        service.release()
        if not device.ended.wait(len(LAYERS) * HANG_S):
            outcome.hangs.append("a released token does not come to its end")


def _judge(
    outcome: Outcome,
    where: str,
    failure: KernelError | None,
    mistakes: list[str],
    is_struck: bool,
    seconds: float,
    deadline: Deadline,
) -> None:
    if failure is None:
        outcome.wrong += [f"{where}: {mistake}" for mistake in mistakes]
        if is_struck:
            outcome.complaints.append(f"{where}: nobody was told of the fault")
        return
    outcome.num_failed += 1
    if not isinstance(failure, KernelError):
        outcome.complaints.append(f"{where}: {failure!r} is no ordinary failure")
    took_long = isinstance(failure, DeadlineError) and seconds > deadline.deadline_s == DEADLINE_S
    outcome.num_late += took_long and not is_struck
    if not (is_struck or took_long):
        outcome.complaints.append(f"{where}: {failure!r} without a fault")


def _refuses(service: ShareService, outcome: Outcome) -> None:
    try:
        service.open()
    except KernelError:
        return
    outcome.complaints.append("a dead service, or one that was stopped, is opened")


@contextmanager
def quick_switches() -> Iterator[None]:
    """Threads change 250 times as often as usual; at the least interval they do nothing else."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


__all__ = ["FAULTS", "DisturbedPosts", "Fault", "Mutation", "Outcome", "play", "quick_switches"]
