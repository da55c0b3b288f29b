"""One layer of a token that a device plans: what is enqueued, on which stream, and what waits for what.

The table in docs/device.md says the same in the order of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from hybrimoe_kt.backends.step_planning import Posted, StepPlanning
from hybrimoe_kt.core.types import ExpertId
from hybrimoe_kt.device.accelerator import Event, Stream
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.readback import Guesses, Predict
from hybrimoe_kt.device.shares.probe import StreamWait
from hybrimoe_kt.device.shares.words import SharePosts
from hybrimoe_kt.device.step_graph import opaque

__all__ = ["PlannedLayers"]


class PlannedLayers:
    """All layers of one lane, by place. Memory that a step passes through is taken when it is first enqueued."""

    def __init__(
        self,
        lane: Lane,
        store: HostStore,
        planning: StepPlanning,
        gates: Mapping[int, Predict],
        *,
        forks: bool,
    ) -> None:
        """`forks`: work goes to streams of its own; else it is done in the order given, which emulated devices record.

        `gates` as of `DevicePlanner`.
        """
        self._lane, self._store, self._planning, self._gates, self._forks = lane, store, planning, gates, forks
        accelerator = lane.accelerator
        self._is_mapped = not all(map(store.is_copied, lane.layers))
        """Whether experts come from the file, on an emulated device: others are refused."""
        if not self._is_mapped:
            planning.set_addresses(
                [store.base(layer).data_ptr() for layer in lane.layers],
                [lane.pool.layers[layer].memory.data_ptr() for layer in lane.layers],
                [store.layouts[layer].slot_bytes for layer in lane.layers],
            )
        self._kept: dict[int, tuple[object, ...]] = {}
        """What other streams read of a layer's step: its memory is not to be given to another while they may."""
        self._guesses: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Layer -> where its gates write ids and scores."""
        self._answers: dict[int, torch.Tensor] = {}
        self._copies, self._gate_stream, self._prefetches = (
            accelerator.stream(name, low_priority=name == "planned prefetches")
            for name in ("planned copies", "planned gates", "planned prefetches")
        )
        self._planned, self._copied, self._ordered = (accelerator.event() for _ in range(3))
        self._ends: dict[Stream, Event] = {}
        self._forked: list[Stream] = []
        """Streams with work of the token under way, which `compute` has to wait for."""
        self._has_ordered = False
        """Whether copies ahead of need have been ordered in it."""

    def begin(self) -> None:
        """A token begins; nothing is forked."""
        self._forked.clear()
        self._has_ordered = False

    def join_streams(self) -> None:
        """Everything that was forked ends before what `compute` is given next: the token's last layer is enqueued."""
        compute = self._lane.accelerator.compute
        for stream in self._forked:
            event = self._ends.setdefault(stream, self._lane.accelerator.event())
            stream.record(event, "planned work")
            compute.wait(event, "everything before the token's end")
        self.begin()

    def guesses(self, layer: int) -> Guesses | None:
        """What the layer's gates have guessed in the token that ended last, on the host."""
        predict, asked = self._gates.get(layer), self._guesses.get(layer)
        if predict is None or asked is None:
            return None
        ids, scores = (part.to("cpu", copy=True) for part in asked)
        return Guesses(predict.layers, ids, scores)

    def enqueue(
        self, layer: int, routed: Routed, scores: torch.Tensor | None, posts: SharePosts, wait: StreamWait
    ) -> torch.Tensor:
        """Enqueue all of a layer's step; see `DevicePlanner.enqueue`. The CPU is asked by `posts` and waited for."""
        planning, lane, compute = self._planning, self._lane, self._lane.accelerator.compute
        place = posts.place[layer]
        if scores is None:
            scores = torch.zeros(planning.form.num_experts, device=routed.ids.device)
            scores.scatter_(0, routed.ids[0], routed.weights[0])
        num_later = self._make_guesses(layer, place, routed)
        self._kept[layer] = routed, scores
        views, slots, outputs = lane.planned_views(routed), lane.pool.layers[layer], planning.outputs
        asked, done = (words[place : place + 1] for words in (posts.asked, posts.done))
        posted = Posted(posts.hidden, posts.ids, posts.weights, asked, done)
        given = routed.ids[0], routed.weights[0], scores, routed.hidden[0]
        plan = partial(planning.plan, place, *given, posted)
        if self._has_ordered:
            compute.wait(self._ordered, "look ahead before the next plan")
        tables = (outputs.resident, outputs.late, outputs.copies, outputs.on_cpu)
        self._launch(compute, plan, given, (*planning.state(place), *tables), "plan a step")
        self._record(compute, self._planned)
        self._wait_for(self._copies, self._planned, "plan before copies on demand")
        copies = (outputs.copies,)
        self._launch(self._copies, partial(self._fetch, place, outputs.copies), copies, (), "bring on demand")
        self._record(self._copies, self._copied)
        for is_first, table in ((True, outputs.resident), (False, outputs.late)):
            if not is_first:
                self._look_ahead(layer, place, num_later, routed)
                self._wait_for(compute, self._copied, "copies on demand before late experts")
                landed = partial(planning.wait_landed, place, posts.timed_out)
                self._launch(compute, landed, (), (posts.timed_out,), "wait for arrivals")
            launch = partial(lane.gpu.launch_planned, slots.key, table, routed, views.out, is_first=is_first)
            self._launch(compute, launch, (table, *routed[:3]), (views.out,), "experts")
        wait.wait(compute, place)
        take = partial(_take, posts.outbox.view(views.cpu.shape), outputs.on_cpu, views.cpu)
        self._launch(compute, take, (posts.outbox, outputs.on_cpu), (views.cpu,), "CPU answer to device")
        if layer not in self._answers:
            self._answers[layer] = torch.empty_like(routed.hidden)
        result = self._answers[layer]
        join = partial(lane.combine_planned, views, result)
        self._launch(compute, join, (views.out, views.cpu), (views.out, views.total, result), "join")
        return result

    def _make_guesses(self, layer: int, place: int, routed: Routed) -> int:
        """How many layers' gates are asked in `layer`; memory for that is taken on `compute`, in front of the fork."""
        predict = self._gates.get(layer)
        if not self._planning.form.prefetch_size or predict is None or not self._are_next(predict.layers, place):
            return 0
        num_later = len(predict.layers)
        if layer not in self._guesses:
            shape, device = (num_later, 1, self._planning.form.top_k), routed.ids.device
            scores = torch.zeros(num_later, predict.num_experts, device=device)
            self._guesses[layer] = torch.zeros(shape, dtype=torch.int64, device=device), scores
        return num_later

    def _look_ahead(self, layer: int, place: int, num_later: int, routed: Routed) -> None:
        """Ask the gates of later layers, order copies by what they say, and make these, beside the layer's experts."""
        planning = self._planning
        if not planning.form.prefetch_size:
            return
        self._wait_for(self._gate_stream, self._planned, "plan before look ahead")
        if num_later:
            ask = partial(self._gates[layer], routed.hidden, *self._guesses[layer])
            self._launch(self._gate_stream, ask, (routed.hidden,), self._guesses[layer], "gates")
        ids = self._guesses[layer][0][:, 0] if num_later else torch.empty(0, planning.form.top_k, dtype=torch.int64)
        states = [part for later in range(num_later + 1) for part in planning.state(place + later)]
        ordered = planning.ahead[place]
        order = partial(planning.look_ahead, place, ids)
        self._launch(self._gate_stream, order, (ids,) if num_later else (), (*states, ordered), "look ahead")
        self._record(self._gate_stream, self._ordered)
        self._has_ordered = self._forks
        self._wait_for(self._prefetches, self._ordered, "look ahead before its copies")
        self._launch(self._prefetches, partial(self._fetch, place, ordered), (ordered,), (), "bring ahead of need")

    def _are_next(self, layers: Sequence[int], place: int) -> bool:
        """Whether `layers` follow the one at `place`: a kernel knows them by their places."""
        return tuple(layers) == self._lane.layers[place + 1 : place + 1 + len(layers)]

    def _fetch(self, place: int, copies: torch.Tensor) -> None:
        """Copies `[n, 3]` of the layer at `place`, or `[n, 4]` of layers that they name."""
        if self._is_mapped:
            opaque(partial(self._fetch_mapped, place, copies))
        else:
            self._planning.fetch(place, copies)
        self._planning.land(place, copies)

    def _fetch_mapped(self, place: int, copies: torch.Tensor) -> None:
        """From the file's mapping, on the host."""
        for row in copies.tolist():
            at, expert, slot, _ = row if len(row) == 4 else (place, *row)
            if expert >= 0:
                layer = self._lane.layers[at]
                parts = self._store.parts(ExpertId(layer, expert))
                self._store.layouts[layer].write(parts, self._lane.pool.layers[layer].views[slot])

    # Streams; where nothing forks, everything is done in the order given.

    def _launch(
        self,
        stream: Stream,
        work: Callable[[], object],
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        site: str,
    ) -> None:
        if self._forks:
            self._lane.accelerator.launch(stream, work, reads=reads, writes=writes, site=site)
        else:
            work()

    def _wait_for(self, stream: Stream, event: Event, site: str) -> None:
        if self._forks:
            stream.wait(event, site)
            if stream is not self._lane.accelerator.compute and stream not in self._forked:
                self._forked.append(stream)

    def _record(self, stream: Stream, event: Event) -> None:
        if self._forks:
            stream.record(event, "planned work")


def _take(outbox: torch.Tensor, asked: torch.Tensor, cpu: torch.Tensor) -> None:
    """Bring the CPU's answer; zeros where it was `asked` nothing, and the outbox holds what it held."""
    cpu.copy_(outbox, non_blocking=True)
    cpu.masked_fill_(asked == 0, 0.0)
