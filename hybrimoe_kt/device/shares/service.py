"""The host's thread that answers what a captured token asks of the CPU; asleep between tokens.

A token's life, on the main thread:

    service.open()                         # then replay
    try: deadline.wait(event.is_done, ...)
    except DeadlineError: service.release(); deadline.wait(event.is_done, ...)
    service.close_step()                   # the stream has come to the token's end
    failure = service.failure()            # None: every share was answered in time

A token whose `failure` is not None is lost, whatever its tensors hold. What a backend raises is kept for that; the
layer and those behind it are answered by zeros at once, so that the stream comes to its end.

Every token, and every release, has a number. Whoever answers does so under a lock and only while the number is still
the one that it began with, so a late answer reaches no later token, nor another service on the same memory.

Of the backends, ggml's `compute` runs in this thread and, through ctypes, without the interpreter's lock;
kt-kernel (llamafile) returns from `submit` at once and is polled; torch_reference computes in `submit`, in torch's
operators, which give the lock away. cpuinfer can only be waited for and keeps the lock meanwhile, so that nobody sees
a deadline pass while it computes.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import threading
import time
import weakref
from collections.abc import Callable

import torch

from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.cores import has_core_to_spare
from hybrimoe_kt.device.waiting import SPIN_S, BackOff, Deadline
from hybrimoe_kt.errors import DeadlineError, KernelError, first_line

from .words import SharePosts

__all__ = ["ShareLog", "ShareService"]

ShareLog = Callable[[int, tuple[int, ...], float, float], object]
"""Told of each share computed: layer, experts, begun and ended in seconds of `time.perf_counter`."""
_AWAITED_S = 10.0
"""At most, at the interpreter's end, for what a thread computes then."""
_kept: list[SharePosts] = []
"""Memory to which a device or a stuck thread may still write."""


class ShareService:
    """Answers the shares of one model, one at a time. Its thread lives until `stop`."""

    def __init__(self, posts: SharePosts, cpu: CpuBackend, deadline: Deadline, log: ShareLog | None = None) -> None:
        """`deadline` bounds each call of `cpu`."""
        self.posts, self.cpu, self.log = posts, cpu, log
        self._deadline, self._request = deadline, _Request(posts)
        self._spin_s = SPIN_S if has_core_to_spare() else 0.0
        self._name = f"the CPU experts' worker ({cpu.name})"
        self._changed = threading.Condition(threading.Lock())
        self._number = 0
        """Of the token or the release under way; who began with another has no say any more."""
        self._is_open = self._is_released = self._is_dead = self._is_stopped = False
        self._busy_since: float | None = None
        """When the call of the backend under way began."""
        self._failure: KernelError | None = None
        self._thread = threading.Thread(target=self._run, name="shares of the CPU", daemon=True)
        _services.add(self)

    # The main thread's.

    def open(self) -> None:
        """Answer from now on what is asked: a token begins. KernelError where the backend has not come back."""
        with self._changed:
            assert not self._is_open, "one token at a time"
            if self._is_dead:
                raise KernelError(f"{self._name} has not come back; restart the program")
            if self._is_stopped:
                raise KernelError(f"{self._name} has been stopped")
            self._is_open, self._is_released, self._failure = True, False, None
            self._number += 1
            self.posts.reset()
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify_all()

    def close_step(self) -> None:
        """Answer nothing more: the stream has come to the token's end, and writes to no word any more.

        After a release a call of the backend that is under way is given the rest of its time.
        """
        with self._changed:
            if not self._is_open:
                return
            if self.posts.has_timed_out:
                self._release(
                    DeadlineError(f"a device's wait, for {self._name} or for a copy, ended itself after its time")
                )
            elif self._failure is None and (self._busy_since is not None or self.posts.next_asked() >= 0):
                self._release(KernelError("a stream went on without the CPU's share: its wait did not hold"))
            self._is_open = False
            self._number += 1
            self.posts.reset()
            if self._busy_since is not None:
                rest_s = max(0.0, self._busy_since + self._deadline.deadline_s - time.perf_counter())
                if not self._changed.wait_for(lambda: self._busy_since is None, rest_s):
                    self._give_up()

    def failure(self) -> KernelError | None:
        """Why the last token is lost; DeadlineError where something did not end."""
        with self._changed:
            return self._failure

    def release(self) -> None:
        """End every wait of the token under way, now and until `close_step`; DeadlineError is its `failure`.

        Returns at once. For whoever waits for the token's end, when the deadline has passed.
        """
        with self._changed:
            if self._is_open:
                limit = self._deadline.deadline_s
                who = self._name if self._busy_since is not None else "a token's work on the device"
                self._release(DeadlineError(f"{who} did not end within {limit:g} s"))

    @property
    def is_dead(self) -> bool:
        """Whether a call of the backend has not come back in its time: it is never asked again."""
        return self._is_dead

    def stop(self) -> None:
        """End the thread. A token under way is released, and its waits ended, until `close_step`; its memory stays."""
        with self._changed:
            if self._is_open:
                self._release(KernelError(f"{self._name} was stopped while a token was under way"))
                _kept.append(self.posts)
            self._is_stopped = True
            self._changed.notify_all()
            is_free = self._busy_since is None
        if is_free and self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_AWAITED_S)

    def _release(self, failure: KernelError) -> None:
        """Under the lock: from now on only zeros are answered, by a thread that nothing holds up."""
        if self._failure is None:
            self._failure = failure
        if not self._is_released:
            self._is_released = True
            self._number += 1
            number = self._number
            with contextlib.suppress(RuntimeError):  # no thread begins at the interpreter's end
                threading.Thread(target=lambda: self._serve(number), name="zeros for the CPU", daemon=True).start()
        self.posts.release()

    def _give_up(self) -> None:
        """Under the lock."""
        if not self._is_dead:
            self._is_dead = True
            _kept.append(self.posts)

    # The thread's.

    def _run(self) -> None:
        number = 0
        while True:
            with self._changed:
                while not (self._is_stopped or self._is_wanted(number)):
                    self._changed.wait()
                if self._is_stopped:
                    return
                number = self._number
            self._serve(number)

    def _is_wanted(self, served: int) -> bool:
        return self._is_open and not self._is_released and not self._is_dead and self._number != served

    def _is_current(self, number: int) -> bool:
        """Under the lock: whether who began with `number` may still write."""
        return self._number == number

    @torch.inference_mode()
    def _serve(self, number: int) -> None:
        """Answer until the number changes."""
        back_off, posts = BackOff(self._spin_s), self.posts
        while self._number == number:
            place = posts.next_asked()
            if place < 0:
                back_off.pause()
            else:
                self._serve_layer(number, place)
                back_off.reset()

    def _serve_layer(self, number: int, place: int) -> None:
        posts, layer = self.posts, self.posts.layers[place]
        with self._changed:
            if not self._is_current(number):
                return
            if self._failure is not None:
                posts.answer(place, None)
                return
            began = self._busy_since = time.perf_counter()
        answer: torch.Tensor | None = None
        failure: BaseException | None = None
        try:
            experts, routed = self._request.read(posts, layer)
            answer = self._computed(layer, routed)
            if self.log is not None:
                self.log(layer, experts, began, time.perf_counter())
        except BaseException as error:  # handed to whoever waits for the token
            failure = error
        with self._changed:
            self._busy_since = None
            self._changed.notify_all()
            if isinstance(failure, DeadlineError):
                self._give_up()
            if not self._is_current(number):
                return
            if failure is not None:
                self._failure = self._as_ours(failure)
            posts.answer(place, None if failure is not None else answer)

    def _computed(self, layer: int, routed: Routed) -> torch.Tensor:
        answer = self.cpu.compute(layer, routed)
        if answer is None:
            self.cpu.submit(layer, routed)
            if not self.cpu.is_done():
                self._deadline.wait(self.cpu.is_done, self._name)
            answer = self.cpu.wait()
        answer = answer[0]
        if answer.shape != self.posts.outbox.shape:
            raise KernelError(f"{self._name} answers {list(answer.shape)}, wanted {list(self.posts.outbox.shape)}")
        return answer

    def _as_ours(self, error: BaseException) -> KernelError:
        if isinstance(error, KernelError):
            return error
        failure = KernelError(f"{self._name} failed: {first_line(error)}")
        failure.__cause__ = error
        return failure


class _Request:
    """What a backend is given, in memory that is used again for the next share; never while a call may read it."""

    def __init__(self, posts: SharePosts) -> None:
        width, top_k = len(posts.hidden), len(posts.ids)
        self._top_k, self._keeps_places = top_k, posts.answers_pairs
        self._hidden, ids, weights = torch.zeros(1, width), torch.full((1, top_k), -1), torch.zeros(1, top_k)
        self._ids, self._weights = ids.numpy()[0].data, weights.numpy()[0].data
        self._routed = [Routed(self._hidden, ids[:, :count], weights[:, :count]) for count in range(top_k + 1)]

    def read(self, posts: SharePosts, layer: int) -> tuple[tuple[int, ...], Routed]:
        """The experts asked for, and all of what is asked; others' pairs are left out where places do not matter.

        KernelError for hidden states that are not finite, which kernels would hide.
        """
        ids, weights = posts.read_inbox(self._hidden[0])
        if not math.isfinite(self._hidden.sum().item()) and not self._hidden.isfinite().all():
            raise KernelError(f"hidden states entering the experts of layer {layer} are not finite (NaN or infinity)")
        mine = [place for place, index in enumerate(ids) if index >= 0]
        places = range(self._top_k) if self._keeps_places or not mine else mine
        for at, place in enumerate(places):
            self._ids[at], self._weights[at] = ids[place], weights[place]
        return tuple([ids[place] for place in mine]), self._routed[len(places)]


_services: weakref.WeakSet[ShareService] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Wait for what is computed: the interpreter's end takes the memory away, and the process with it."""
    for service in list(_services):
        service.stop()
        if service._thread.ident is not None:
            service._thread.join(_AWAITED_S)
