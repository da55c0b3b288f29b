"""Brings experts into slots: on-demand transfers at once, prefetches piece by piece as long as the link is idle.

Copies on a link cannot be called back, and no device promises that one stream's copies overtake another's. So a
prefetch is given to its stream in chunks, never more than a window ahead; everything else waits here, where an
on-demand transfer passes it, an abort drops it, and a plan that needs it sends the rest at once.

A transfer comes from a page-locked copy in slot layout, as one copy or in spans of it; or from the mapped file,
directly where that is registered with the driver, otherwise through staging. Blocks that the slot holds in planes then
land beside the slot first and are taken apart there, by the device, on the stream of the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import torch

from hybrimoe_kt.core.types import Transfer
from hybrimoe_kt.errors import KernelError

from .accelerator import Accelerator, Stream
from .activity import Watcher
from .host_store import HostStore
from .slots import LayerSlots, SlotPool
from .staging import Chunk, Ring, chunks_of, spans_of
from .waiting import Deadline

__all__ = ["TransferQueue"]

NUM_RING_CHUNKS = 4
"""Copies under way per stream: one being filled, one being copied, one waiting, one to spare."""
NUM_WHOLE = 2
"""Prefetches under way where experts are sent whole: one being copied, one waiting. An on-demand transfer may have to
wait for both."""
_WHOLE = 2**62
_NO_SLOTS: Collection[int] = ()


class Channel:
    """One stream of copies, with the places its chunks take in turn and where they land to be taken apart."""

    __slots__ = ("landing", "name", "ring", "stream")

    def __init__(self, name: str, stream: Stream, ring: Ring, landing: torch.Tensor) -> None:
        self.name, self.stream, self.ring, self.landing = name, stream, ring, landing


class Pending:
    """A transfer with chunks still to send."""

    __slots__ = ("channel", "chunks", "next_chunk", "place", "plan", "slots", "transfer")

    def __init__(
        self,
        transfer: Transfer,
        slots: LayerSlots,
        place: int,
        chunks: Sequence[Chunk | slice],
        channel: Channel,
        plan: int,
    ) -> None:
        self.transfer, self.slots, self.place, self.chunks, self.channel = transfer, slots, place, chunks, channel
        self.next_chunk, self.plan = 0, plan


class TransferQueue:
    """The host's end of one accelerator's link."""

    def __init__(
        self,
        accelerator: Accelerator,
        store: HostStore,
        pool: SlotPool,
        *,
        chunk_bytes: int,
        deadline: Deadline,
        whole_bytes: int = 0,
    ) -> None:
        """Prefetches go in chunks of `chunk_bytes`; from a page-locked copy whole, up to `whole_bytes` an expert."""
        self._accelerator, self._store, self._pool, self._deadline = accelerator, store, pool, deadline
        layouts = {layer: slots.layout for layer, slots in pool.layers.items()}
        ready = {layer: layout for layer, layout in layouts.items() if store.is_copied(layer)}
        mapped = {layer: layout for layer, layout in layouts.items() if layer not in ready}
        pieces = {layer: chunks_of(layout, chunk_bytes) for layer, layout in mapped.items()}
        spans = {
            layer: spans_of(layout, _WHOLE if layout.slot_bytes <= whole_bytes else chunk_bytes)
            for layer, layout in ready.items()
        }
        self._chunks: dict[int, Sequence[Chunk | slice]] = {**pieces, **spans}
        self._whole: dict[int, Sequence[Chunk | slice]] = {
            **{layer: chunks_of(layout, _WHOLE) for layer, layout in mapped.items()},
            **{layer: spans_of(layout, _WHOLE) for layer, layout in ready.items()},
        }
        largest = max((sum(r.num_bytes for r in c) for cs in pieces.values() for c in cs), default=0)
        self.direct = frozenset(layer for layer in layouts if store.is_direct(layer))
        """Layers whose experts reach the device without staging."""
        staged = 0 if len(self.direct) == len(layouts) else largest
        whole = max((layout.slot_bytes for layer, layout in mapped.items() if store.is_registered(layer)), default=0)
        landing = 0 if all(layout.is_file_order for layout in mapped.values()) else max(largest, whole)
        is_whole = not mapped and all(len(cut) == 1 for cut in spans.values())
        self._on_demand = self._channel("on-demand copies", "on-demand copied", staged, landing, low_priority=False)
        self._prefetch = self._channel(
            "prefetch copies", "prefetch copied", staged, landing,
            low_priority=True, num_places=NUM_WHOLE if is_whole else NUM_RING_CHUNKS,
        )  # fmt: skip
        fresh = accelerator.event()
        accelerator.compute.record(fresh, "last use of fresh memory")
        for channel in (self._on_demand, self._prefetch):
            channel.stream.wait(fresh, "fresh memory before landing")
        self.waiting: dict[tuple[int, int], Pending] = {}
        """Prefetches not fully handed to the device, by layer and slot, in the order taken: to be read, not written."""
        self.log: Watcher | None = None
        self.number = 0
        """Of this link in the log."""
        self.in_use_layer, self.in_use = -1, _NO_SLOTS
        """The open plan's layer and the slots that it computes with; prefetches must leave them alone."""
        self.open_layer = -1
        """The open plan's layer, while none of its slots is read and then overwritten by the plan itself; else -1."""

    def _channel(
        self, name: str, site: str, staged: int, landing: int, *, low_priority: bool, num_places: int = NUM_RING_CHUNKS
    ) -> Channel:
        accelerator = self._accelerator
        stream = accelerator.stream(name, low_priority=low_priority)
        memory = accelerator.allocate(landing) if landing else torch.empty(0, dtype=torch.uint8)
        return Channel(name, stream, Ring(accelerator, num_places, staged, site), memory)

    @property
    def streams(self) -> tuple[Stream, Stream]:
        """The two streams of copies."""
        return self._on_demand.stream, self._prefetch.stream

    def slots_waiting(self, layer: int) -> set[int]:
        """The slots of `layer` into which something has yet to be sent; their marks are those of what was there."""
        return {slot for waiting_layer, slot in self.waiting if waiting_layer == layer}

    def close_plan(self) -> None:
        """No plan is open on this accelerator."""
        self.in_use_layer = self.open_layer = -1

    def start(self, transfer: Transfer) -> None:
        """Hand an on-demand transfer to the device, whole, before anything that waits here.

        Only enqueues for `direct` layers; otherwise copies through staging, and waits for it.
        """
        layer = transfer.expert.layer
        chunks = (self._whole if layer in self.direct else self._chunks)[layer]
        self._send_all(self._open(transfer, self._on_demand, chunks))

    def enqueue(self, transfer: Transfer) -> None:
        """Take a prefetch; `pump` sends it."""
        layer = transfer.expert.layer
        is_pinned = layer == self.in_use_layer and transfer.slot in self.in_use
        assert not is_pinned, f"{transfer} overwrites what its plan pinned"
        self.waiting[layer, transfer.slot] = self._open(transfer, self._prefetch, self._chunks[layer])

    def pump(self, may_go_on: Callable[[], bool] | None = None) -> None:
        """Send waiting chunks while the window has room and `may_go_on()`."""
        ring = self._prefetch.ring
        while self.waiting and ring.has_room() and (may_go_on is None or may_go_on()):
            place, pending = next(iter(self.waiting.items()))
            self._send(pending, paced=True)
            if pending.next_chunk == len(pending.chunks):
                del self.waiting[place]

    def hasten(self, layer: int, slots: Iterable[int]) -> None:
        """Send what waits for `slots`, if anything does, before all others."""
        waiting = self.waiting
        for slot in slots:
            if (layer, slot) in waiting:
                self._send_all(waiting[layer, slot])
                del waiting[layer, slot]

    def settle(self, layer: int, slot: int) -> None:
        """Let `compute` read `slot` once what is under way into it has arrived; sends the rest of it now."""
        self.hasten(layer, (slot,))
        slots, place = self._pool.locate(layer, slot)
        if place in slots.unsettled:
            self._accelerator.compute.wait(slots.written[place], "arrival before use")
            slots.unsettled.discard(place)

    def close_buffer(self, layer: int) -> None:
        """The layer's buffer slots are lent no longer: send nothing into them that has not been sent."""
        stream = self._pool.buffers.get(layer)
        if stream is not None:
            self._keep(lambda pending: pending.slots is not stream)
            stream.unsettled.clear()

    def abort(self, transfers: Sequence[Transfer]) -> None:
        """Send no more of these; what has been sent stays ordered before whatever comes into the slot next."""
        gone = set(transfers)
        self._keep(lambda pending: pending.transfer not in gone)

    def drop_layer(self, layer: int) -> None:
        """Forget what waits for a layer whose slots are going away."""
        self._keep(lambda pending: pending.transfer.expert.layer != layer)

    def _keep(self, is_wanted: Callable[[Pending], bool]) -> None:
        self.waiting = {place: pending for place, pending in self.waiting.items() if is_wanted(pending)}

    def doubtful_slots(self) -> set[tuple[int, int]]:
        """Drop what waits, and return layer and slot of everything that has not arrived for certain."""
        found = set(self.waiting)
        self.waiting = {}
        for layer, slots in self._pool.groups:
            for place in slots.unsettled:
                try:
                    arrived = slots.written[place].is_done()
                except (RuntimeError, KernelError):  # the copy itself failed
                    slots.written[place] = self._accelerator.event()
                    arrived = False
                if not arrived:
                    found.add((layer, slots.first + place))
            if slots.buffer is not None:
                slots.unsettled.clear()
        self._on_demand.ring.forget_failures()
        self._prefetch.ring.forget_failures()
        return found

    def _open(self, transfer: Transfer, channel: Channel, chunks: Sequence[Chunk | slice]) -> Pending:
        layer = transfer.expert.layer
        # The core may have given away a slot whose prefetch it thinks long arrived.
        self.waiting.pop((layer, transfer.slot), None)
        slots, place = self._pool.locate(layer, transfer.slot)
        slots.unsettled.add(place)
        return Pending(transfer, slots, place, chunks, channel, self.log.plan_number if self.log is not None else 0)

    def _send_all(self, pending: Pending) -> None:
        paced = pending.transfer.expert.layer not in self.direct
        while pending.next_chunk < len(pending.chunks):
            self._send(pending, paced=paced)

    def _send(self, pending: Pending, *, paced: bool) -> None:
        """Give the next chunk to the device; if `paced`, in a place of the channel's ring, waiting for one."""
        transfer, slots, channel = pending.transfer, pending.slots, pending.channel
        stream = channel.stream
        buffer = channel.ring.take(self._deadline) if paced else channel.landing
        if pending.next_chunk == 0:
            # A slot that the open plan does not read was last read a step ago: no need to wait for this one's experts.
            is_open = transfer.expert.layer == self.open_layer
            for event in (slots.read_before,) if is_open else (slots.read_before, slots.read_done):
                stream.wait(event, "readers before overwrite")
            stream.wait(slots.written[pending.place], "earlier copy before overwrite")
            if slots.buffer is not None:
                for event in slots.buffer.written_by.values():
                    stream.wait(event, "another layer's copy before overwrite")
        chunk, slot = pending.chunks[pending.next_chunk], slots.views[pending.place]
        before = self._accelerator.stamp(stream) if self.log is not None and self.log.is_open else None
        try:
            if isinstance(chunk, slice):
                ready = self._store.page_locked(transfer.expert)
                self._accelerator.copy(stream, slot[chunk], ready[chunk], "expert copy")
            else:
                self._copy_mapped(channel, chunk, transfer, slot, buffer)
        finally:  # whatever was enqueued before one of them failed is under way
            if paced:
                channel.ring.give(stream)
            pending.next_chunk += 1
            if before is not None and self.log is not None:
                piece, pieces, after = pending.next_chunk, len(pending.chunks), self._accelerator.stamp(stream)
                self.log.sent(self.number, transfer, pending.plan, piece, pieces, before, after)
            stream.record(slots.written[pending.place], "arrival")
            if slots.buffer is not None:
                event = slots.buffer.written_by.setdefault(channel.name, self._accelerator.event())
                stream.record(event, "copied into the stream buffer")

    def _copy_mapped(
        self, channel: Channel, chunk: Chunk, transfer: Transfer, slot: torch.Tensor, buffer: torch.Tensor
    ) -> None:
        """From the file, in its order; through `buffer` unless the driver reads the mapping in place."""
        parts = self._store.parts(transfer.expert)
        registered = self._store.is_registered(transfer.expert.layer)
        at = 0
        for run in chunk:
            source = run.source(parts)
            if not registered:
                staged = buffer[at : at + run.num_bytes]
                self._accelerator.on_host("fill staging", writes=(staged,))
                source = staged.copy_(source)
            targets = run.targets(slot)
            blocks = targets[0].view(-1) if run.is_file_order else channel.landing[at : at + run.num_bytes]
            self._accelerator.copy(channel.stream, blocks, source, "expert copy")
            if not run.is_file_order:
                split = partial(run.split, blocks, slot)
                self._accelerator.launch(
                    channel.stream, split, reads=(blocks,), writes=tuple(targets), site="take blocks apart"
                )
            at += run.num_bytes
