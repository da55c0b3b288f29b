"""Brings experts into slots: on-demand transfers at once, prefetches piece by piece as long as the link is idle.

Copies on a link cannot be called back, and no device promises that one stream's copies overtake another's. So a
prefetch is given to its stream in chunks, never more than a window ahead; everything else waits here, where an
on-demand transfer passes it, an abort drops it, and a plan that needs it sends the rest at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from hybrimoe_kt.core.types import Transfer

from .accelerator import Accelerator, Stream
from .host_store import HostStore
from .slots import LayerSlots, SlotPool
from .staging import Chunk, Ring, chunks_of
from .waiting import Patience

__all__ = ["TransferQueue"]

NUM_RING_CHUNKS = 4
"""Copies under way per ring: one being filled, one being copied, one waiting, one to spare."""


class Pending:
    """A transfer with chunks still to send."""

    __slots__ = ("chunks", "next_chunk", "slots", "stream", "transfer")

    def __init__(self, transfer: Transfer, slots: LayerSlots, chunks: Sequence[Chunk], stream: Stream) -> None:
        self.transfer, self.slots, self.chunks, self.stream = transfer, slots, chunks, stream
        self.next_chunk = 0

    def is_for(self, layer: int, slot: int) -> bool:
        return self.transfer.slot == slot and self.transfer.expert.layer == layer


class TransferQueue:
    """The host's end of one accelerator's link."""

    def __init__(
        self, accelerator: Accelerator, store: HostStore, pool: SlotPool, *, chunk_bytes: int, patience: Patience
    ) -> None:
        self._accelerator, self._store, self._pool, self._patience = accelerator, store, pool, patience
        self._on_demand = accelerator.stream("on-demand copies")
        self._prefetch = accelerator.stream("prefetch copies", low_priority=True)
        self._chunks = {layer: chunks_of(slots.layout, chunk_bytes) for layer, slots in pool.layers.items()}
        self._whole = {layer: chunks_of(slots.layout, slots.layout.slot_bytes) for layer, slots in pool.layers.items()}
        direct = all(store.is_direct(layer) for layer in pool.layers)
        largest = max((c.end_bytes - c.start_bytes for chunks in self._chunks.values() for c in chunks), default=0)
        size = 0 if direct else largest
        self._on_demand_ring = Ring(accelerator, NUM_RING_CHUNKS, size, "on-demand copied")
        self._prefetch_ring = Ring(accelerator, NUM_RING_CHUNKS, size, "prefetch copied")
        self._waiting: list[Pending] = []
        self.in_use: Collection[tuple[int, int]] = ()
        """Layer and slot of everything the open plan computes with; prefetches must leave it alone."""

    @property
    def num_waiting(self) -> int:
        """Prefetches not fully handed to the device."""
        return len(self._waiting)

    def start(self, transfer: Transfer) -> None:
        """Hand an on-demand transfer to the device, whole, before anything that waits here."""
        layer = transfer.expert.layer
        if self._store.is_direct(layer):
            self._send(self._open(transfer, self._on_demand, self._whole[layer]), None)
            return
        pending = self._open(transfer, self._on_demand, self._chunks[layer])
        while pending.next_chunk < len(pending.chunks):
            self._send(pending, self._on_demand_ring)

    def enqueue(self, transfer: Transfer) -> None:
        """Take a prefetch; `pump` sends it."""
        assert (transfer.expert.layer, transfer.slot) not in self.in_use, f"{transfer} overwrites what its plan pinned"
        pending = self._open(transfer, self._prefetch, self._chunks[transfer.expert.layer])
        self._waiting.append(pending)

    def pump(self, may_go_on: Callable[[], bool] | None = None) -> None:
        """Send waiting chunks while the window has room and `may_go_on()`."""
        ring = self._prefetch_ring
        while self._waiting and ring.has_room() and (may_go_on is None or may_go_on()):
            pending = self._waiting[0]
            self._send(pending, ring)
            if pending.next_chunk == len(pending.chunks):
                self._waiting.pop(0)

    def settle(self, layer: int, slot: int) -> None:
        """Let `compute` read `slot` once what is under way into it has arrived; sends the rest of it now."""
        for pending in self._waiting:
            if pending.is_for(layer, slot):
                self._send_all(pending)
                self._waiting.remove(pending)
                break
        slots = self._pool.layers[layer]
        if slot in slots.unsettled:
            self._accelerator.compute.wait(slots.written[slot], "arrival before use")
            slots.unsettled.discard(slot)

    def abort(self, transfers: Sequence[Transfer]) -> None:
        """Send no more of these; what has been sent stays ordered before whatever comes into the slot next."""
        gone = set(transfers)
        self._waiting = [pending for pending in self._waiting if pending.transfer not in gone]

    def drop_layer(self, layer: int) -> None:
        """Forget what waits for a layer whose slots are going away."""
        self._waiting = [pending for pending in self._waiting if pending.transfer.expert.layer != layer]

    def doubtful_slots(self) -> set[tuple[int, int]]:
        """Drop what waits, and return layer and slot of everything that has not arrived for certain."""
        found = {(pending.transfer.expert.layer, pending.transfer.slot) for pending in self._waiting}
        self._waiting = []
        for layer, slots in self._pool.layers.items():
            for slot in slots.unsettled:
                try:
                    arrived = slots.written[slot].is_done()
                except RuntimeError:  # the copy itself failed
                    slots.written[slot] = self._accelerator.event()
                    arrived = False
                if not arrived:
                    found.add((layer, slot))
        self._on_demand_ring.forget_failures()
        self._prefetch_ring.forget_failures()
        return found

    def _open(self, transfer: Transfer, stream: Stream, chunks: Sequence[Chunk]) -> Pending:
        layer = transfer.expert.layer
        if self._waiting:  # the core may have given away a slot whose prefetch it thinks long arrived
            self._waiting = [p for p in self._waiting if not p.is_for(layer, transfer.slot)]
        slots = self._pool.layers[layer]
        slots.unsettled.add(transfer.slot)
        return Pending(transfer, slots, chunks, stream)

    def _send_all(self, pending: Pending) -> None:
        while pending.next_chunk < len(pending.chunks):
            self._send(pending, self._prefetch_ring)

    def _send(self, pending: Pending, ring: Ring | None) -> None:
        """Give the next chunk to the device; waits for a place in `ring`, if one is given and full."""
        transfer, slots, stream = pending.transfer, pending.slots, pending.stream
        chunk = pending.chunks[pending.next_chunk]
        buffer = ring.take(self._patience, chunk.end_bytes - chunk.start_bytes) if ring is not None else None
        if pending.next_chunk == 0:
            stream.wait(slots.read_done, "readers before overwrite")
            stream.wait(slots.written[transfer.slot], "earlier copy before overwrite")
        target = slots.memory[transfer.slot, chunk.start_bytes : chunk.end_bytes]
        source = self._store.page_locked(transfer.expert)
        if source is not None:
            self._accelerator.copy(stream, target, source[chunk.start_bytes : chunk.end_bytes], "expert copy")
        elif self._store.is_registered(transfer.expert.layer):
            self._copy_registered(stream, chunk, transfer, slots)
        else:
            assert buffer is not None, "experts that devices cannot read in place pass through a ring"
            self._accelerator.on_host("fill staging", writes=(buffer,))
            chunk.gather(self._store.parts(transfer.expert), buffer)
            self._accelerator.copy(stream, target, buffer, "expert copy")
        if ring is not None:
            ring.give(stream)
        pending.next_chunk += 1
        stream.record(slots.written[transfer.slot], "arrival")

    def _copy_registered(self, stream: Stream, chunk: Chunk, transfer: Transfer, slots: LayerSlots) -> None:
        """Straight from the mapping: one copy per run, as gate, up and down lie apart there."""
        parts = self._store.parts(transfer.expert)
        slot = slots.memory[transfer.slot]
        for segment, first, count in chunk.runs:
            width = segment.plane.width_bytes
            at = segment.start_bytes + first * width
            source = parts[segment.matrix][first * width : (first + count) * width]
            self._accelerator.copy(stream, slot[at : at + count * width], source, "expert copy")
