"""Conversations kept after their answers, so that a prompt which begins like one of them is not read again."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from hybrimoe_kt.errors import first_line

from .conversation import Conversation, common_length
from .growing_cache import GrowingCache
from .host_copy import HostCopy
from .layer_states import LayerStates

__all__ = ["PrefixCache"]

logger = logging.getLogger(__name__)


class PrefixCache:
    """Keeps conversations in a memory budget, the latest used; finds the one that a prompt shares most tokens with.

    On an accelerator at most `most_live` have their memory there, those being answered among them; the others are
    moved to the host. That memory is handed on, so that what was captured of steps stays worth something, as long as
    there is enough of it.
    """

    def __init__(
        self, new_cache: Callable[[], GrowingCache], budget_bytes: int, *, most_live: int, moves_to_host: bool
    ) -> None:
        """`budget_bytes` of kept ones together; the latest is kept in any case. 0 keeps that alone."""
        self._new_cache, self.budget_bytes, self._most_live = new_cache, budget_bytes, most_live
        self._moves_to_host = moves_to_host
        self.most_live_tokens: int | None = None
        """Tokens that accelerators have memory for; None: not known."""
        self._kept: OrderedDict[int, Conversation | HostCopy] = OrderedDict()
        self._free: list[GrowingCache] = []
        self._in_use: dict[int, Conversation] = {}
        self._number = 0
        self.num_hits = self.num_misses = 0
        """Prompts that went on from what was kept, and others."""

    def __len__(self) -> int:
        """Conversations kept, without those in use."""
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Memory of those kept."""
        return sum(each.num_bytes for each in list(self._kept.values()))  # asked for by other threads as well

    def take(self, prompt: Sequence[int], num_needed: int = 0) -> Conversation:
        """Return a conversation that holds as much of `prompt` as any, at most all but its last token.

        It is in use until it is given back: by `put`, or by `drop`. `num_needed` as of `hold`, with this one in use.
        """
        best, number = max(((each.reach(prompt), number) for number, each in self._all()), default=(0, -1))
        if best == 0:
            self.num_misses += 1
            return self.new(num_needed)
        self.num_hits += 1
        found = self._kept.get(number)
        is_continued = found is not None and self._is_continued(found, best)
        if is_continued and isinstance(found, Conversation):
            taken = self._taken(number)
            self.hold(num_needed)
        else:
            self.hold(num_needed, beside=True)  # which may move what was found, or forget it
            taken = self._taken(number) if is_continued else self._copied(number, best)
        if taken is None:
            return self.new()
        taken.go_back(best)
        return taken

    def _all(self) -> Iterable[tuple[int, Conversation | HostCopy]]:
        yield from self._in_use.items()
        yield from self._kept.items()  # behind: of equal ones max takes the latest number

    def _is_continued(self, kept: Conversation | HostCopy, length: int) -> bool:
        """Whether what a prompt leaves out of a conversation is no more than its last answer, and how that begins."""
        return not self.budget_bytes or length >= kept.num_before

    def _taken(self, number: int) -> Conversation | None:
        """A kept one itself; None where it is not kept, or cannot be had."""
        found = self._kept.pop(number, None)
        if isinstance(found, HostCopy):
            return self._filled(found.ids, found.states, found.marks)
        if found is not None:
            self._in_use[self._next()] = found
        return found

    def _copied(self, number: int, length: int) -> Conversation | None:
        """A copy of the first tokens; a kept one itself where its states cannot be copied."""
        found = self._kept.get(number, self._in_use.get(number))
        if isinstance(found, HostCopy):
            return self._filled(found.ids, found.states, found.marks)
        states = None if found is None else found.states(length)
        if found is None or states is None:
            return self._taken(number)
        return self._filled(found.ids[:length], states, found.marks_up_to(length))

    def _filled(
        self, ids: Sequence[int], states: Sequence[LayerStates], marks: dict[int, list[LayerStates | None]]
    ) -> Conversation | None:
        """One with these; None, with nothing of it left, where there is no memory for them, say: then they are read."""
        made = self.new()
        try:
            made.fill(ids, states, marks)
        except RuntimeError as error:
            self.drop(made)
            logger.warning(
                "%d tokens that are kept cannot be gone on from, and are read: %s", len(ids), first_line(error)
            )
            return None
        return made

    def new(self, num_needed: int = 0) -> Conversation:
        """Return an empty conversation, in use; `num_needed` as of `hold`."""
        if self._moves_to_host:
            self._make_place()
            self.hold(num_needed, beside=True)
        cache = self._free.pop() if self._free else self._new_cache()
        made = Conversation(cache)
        self._in_use[self._next()] = made
        return made

    def _next(self) -> int:
        self._number += 1
        return self._number

    def put(self, conversation: Conversation) -> None:
        """Keep it, as the latest one."""
        self._leave(conversation)
        if not conversation.ids:
            self.release(conversation)
            return
        self._forget_within(conversation)
        self._kept[self._next()] = conversation
        if self._moves_to_host:
            self._make_place(beside=0)
        self.fit()

    def _forget_within(self, latest: Conversation) -> None:
        """Kept ones that are no more than this one's beginning are of no use, where it can go back."""
        if not latest.is_croppable:
            return
        for number, each in list(self._kept.items()):
            if len(each.ids) <= len(latest.ids) and common_length(each.ids, latest.ids) == len(each.ids):
                self._forget(number)

    def drop(self, conversation: Conversation) -> None:
        """Give it up with its memory: a step has failed in it."""
        self._leave(conversation)

    def release(self, conversation: Conversation) -> None:
        """Give it up; its memory may serve another."""
        self._leave(conversation)
        if self._moves_to_host:
            conversation.cache.forget()
            self._free.append(conversation.cache)

    def _leave(self, conversation: Conversation) -> None:
        for number, each in list(self._in_use.items()):
            if each is conversation:
                del self._in_use[number]

    def _make_place(self, beside: int = 1) -> None:
        """Move the ones used longest ago to the host, so that there is memory for `beside` more."""
        while len(self._in_use) + self._num_live() + beside > self._most_live:
            number = next((number for number, each in self._kept.items() if isinstance(each, Conversation)), None)
            if number is None:
                return
            self._move(number)

    def hold(self, num_needed: int, *, beside: bool = False) -> None:
        """Have accelerators hold no more than `most_live_tokens`, of which those in use need `num_needed` at least.

        Memory of nobody goes first, but for a last one where somebody is to have it `beside`; then conversations are
        moved to the host, the ones used longest ago first, and that last one in the end.
        """
        if not self._moves_to_host or self.most_live_tokens is None:
            return
        while self._room(num_needed, beside=beside) > self.most_live_tokens:
            number = next((number for number, each in self._kept.items() if isinstance(each, Conversation)), None)
            if self._free and (number is None or len(self._free) > beside):
                del self._free[0]
            elif number is None:
                return
            else:
                self._move(number)

    def _room(self, num_needed: int, *, beside: bool) -> int:
        """Tokens that there is memory for, or that those in use need, with the last of nobody's among them `beside`."""
        free, caches = list(self._free), [each.cache for each in self._in_use.values()]
        if beside and free:
            caches.append(free.pop())
        kept = [each.cache for each in self._kept.values() if isinstance(each, Conversation)]
        in_use = sum(cache.usual_room for cache in caches)
        return max(num_needed, in_use) + sum(cache.usual_room for cache in (*kept, *free))

    def _num_live(self) -> int:
        return sum(isinstance(each, Conversation) for each in self._kept.values())

    def _move(self, number: int) -> None:
        found = self._kept[number]
        assert isinstance(found, Conversation), "on its accelerator"
        copy = HostCopy.of(found) if self.budget_bytes else None
        if copy is None:
            del self._kept[number]
        else:
            self._kept[number] = copy
        found.cache.forget()
        self._free.append(found.cache)

    def fit(self) -> None:
        """Forget the ones used longest ago until the others fit into the budget; the latest stays."""
        while len(self._kept) > 1 and self.num_bytes > self.budget_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, number: int) -> None:
        found = self._kept.pop(number)
        if isinstance(found, Conversation) and self._moves_to_host:
            found.cache.forget()
            self._free.append(found.cache)

    def clear(self) -> None:
        """Forget all that are kept."""
        for number in list(self._kept):
            self._forget(number)

    def copies(self) -> Iterable[HostCopy]:
        """All that are kept, the ones used longest ago first; valid until anything else is done."""
        for each in list(self._kept.values()):
            copy = HostCopy.of(each, copies=False) if isinstance(each, Conversation) else each
            if copy is not None:
                yield copy

    def restore(self, copies: Iterable[HostCopy]) -> int:
        """Keep these as well, as if they had been used before all that are kept; return how many fit."""
        latest = list(self._kept.values())
        self._kept.clear()
        for each in (*copies, *latest):
            self._kept[self._next()] = each
        self.fit()
        return len(self._kept) - len(latest)

    def spare(self) -> bool:
        """Give back what conversations that are not in use have on accelerators; whether there was anything."""
        if not self._moves_to_host:
            return False
        live = [number for number, each in self._kept.items() if isinstance(each, Conversation)]
        for number in live:
            self._move(number)
        had = bool(self._free)
        self._free.clear()
        return had
