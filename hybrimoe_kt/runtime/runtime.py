"""What all MoE layers of a model share: coordinator, executor, and the clock that times them.

Operators add their layer and hand over every step; the host starts the runtime once all layers are there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.core.types import LayerSpec, Plan, Routing, Transfer
from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.activity import ActivityLog
from hybrimoe_kt.device.executor import AcceleratorFailed, Executor
from hybrimoe_kt.device.host_store import HostStore, LayerExperts
from hybrimoe_kt.device.inbox import Predict, Step, ask
from hybrimoe_kt.errors import ConfigError, DeadlineError, KernelError

from .assembly import Assembly, assemble, make_coordinator
from .description import configuration, describe
from .health import Health
from .recording import RoutingRecorder, halved, record
from .recovery import Recovery
from .routing import mean_probabilities, predicted_routing, routing_of
from .seconds import Seconds
from .watch import Watch

__all__ = ["RoutingRecorder", "Runtime", "Seconds"]

logger = logging.getLogger(__name__)


class Runtime:
    """One a model. `add_layer` for every MoE layer, `start` once, then `run` per layer and step."""

    def __init__(self, options: ExpertOptions) -> None:
        self.options = options
        self.store = HostStore()
        self.seconds = Seconds()
        self.coordinator: Coordinator | None = None
        self.recorder: RoutingRecorder | None = None
        self._log: ActivityLog | None = None
        self._accelerator_of: dict[int, str] = {}
        self._look_ahead: dict[int, Predict] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._assembly: Assembly | None = None
        self._executor: Executor | None = None
        self._recovery: Recovery | None = None
        self._watch: Watch | None = None
        self._counting = threading.Lock()

    @classmethod
    def shared_by(cls, owner: Any, options: ExpertOptions, rule_key: str) -> Runtime:
        """Return the runtime kept on `owner` (the loader that all operators of a model are given), or make it.

        Options but `accelerator` must agree between layers; the owner's `option_overrides` (the command line) win.
        """
        options = options.replace(getattr(owner, "option_overrides", {}))
        runtime: Runtime | None = getattr(owner, "runtime", None)
        if runtime is None:
            runtime = owner.runtime = cls(options)
        elif runtime.options != options.replace({"accelerator": runtime.options.accelerator}):
            raise ConfigError(
                f"{rule_key}: its expert options differ from an earlier layer's; all MoE layers share one set"
            )
        return runtime

    @property
    def started(self) -> bool:
        return self._executor is not None

    def add_layer(self, experts: LayerExperts, accelerator: str | None = None) -> None:
        """Take a layer's experts, and the name of its accelerator where that is not `options.accelerator`."""
        assert not self.started, "layers are added before the runtime starts"
        self.store.add(experts)
        self._accelerator_of[experts.layer] = accelerator or self.options.accelerator

    def start(self) -> None:
        """Create slots, backends and coordinator, and fill the slots. May take seconds; call outside generation."""
        if not self.store.layers:
            raise ConfigError("no HybriMoEExperts in this model: no rule of the rule file replaces its experts")
        self._assembly = assemble(self.options, self.store, self._accelerator_of)
        self._executor = self._assembly.executor
        self.coordinator = self.new_coordinator()
        self._recovery = Recovery(self.coordinator, self._executor)
        if self._assembly.is_on_the_clock:
            self._watch = Watch(self.options, self.coordinator, self._executor)
        while not self._fill_slots():
            pass
        logger.info("%s", self.describe())

    def _fill_slots(self) -> bool:
        """Bring an expert into every free slot; False if an accelerator failed at it: then what is free has changed."""
        assert self.coordinator is not None and self._executor is not None, "the runtime is starting"
        assert self._recovery is not None, "the runtime is starting"
        transfers = self.coordinator.initial_transfers()
        for number, transfer in enumerate(transfers):
            try:
                self._executor.fill(transfer)
            except AcceleratorFailed as failure:
                for missing in transfers[number:]:
                    self.coordinator.fail(missing)
                self._recovery.recover(failure)  # gives up after a few times, so this ends
                return False
        return True

    def layer_specs(self) -> list[LayerSpec]:
        """What the coordinator knows of each MoE layer, in order."""
        assert self._assembly is not None, "the runtime has started"
        return list(self._assembly.specs)

    def record_timeline(self, timeline: Timeline) -> None:
        """Write down from now on what CPU, accelerators, links and scheduler do, until `finish_timeline`."""
        assert self._executor is not None, "the runtime has started"
        timeline.info |= {
            "origin": "a run, on the host's clock",
            "scheduler": "host clock",
            "CPU": "host clock, from submission to when the host saw it done",
        }
        self._log = ActivityLog(timeline, min(self.store.layers))
        self._executor.log_to(self._log)

    def finish_timeline(self) -> Timeline | None:
        """Wait for what is under way and return the timeline; None if none was being recorded."""
        assert self._executor is not None, "the runtime has started"
        log, self._log = self._log, None
        if log is None:
            return None
        for lane in self._executor.lanes:
            name = f"GPU {lane.number}, link {lane.number} ({lane.accelerator.name})"
            log.timeline.info[name] = lane.accelerator.stamps_are  # known for certain after the first stamp only
        self._executor.log_to(None)
        for lane in self._executor.lanes:
            with contextlib.suppress(DeadlineError):
                lane.drain()
        return log.close()

    def configuration(self) -> dict[str, Any]:
        """What decisions follow from, beside the routing, as plain data; layers in order."""
        assert self._assembly is not None, "the runtime has started"
        return configuration(self.options, self.store, self._assembly)

    def new_coordinator(self) -> Coordinator:
        """Make a coordinator in its initial state for this model and these options."""
        assert self._assembly is not None, "the runtime has started"
        return make_coordinator(self.options, self._assembly)

    @property
    def accelerators(self) -> tuple[Accelerator, ...]:
        """Those that serve layers; none on a CPU-only machine."""
        return tuple(lane.accelerator for lane in self._executor.lanes) if self._executor else ()

    @property
    def num_slots(self) -> int:
        """Experts that can be resident at once, over all layers."""
        return sum([lane.pool.num_slots for lane in self._executor.lanes]) if self._executor else 0

    @property
    def num_expert_threads(self) -> int:
        """Threads the CPU backend keeps busy on its own; 0 when it computes on the caller's."""
        return getattr(self._executor.cpu, "num_threads", 0) if self._executor else 0

    @property
    def experts_read_in_place(self) -> list[LayerExperts]:
        """Those that the CPU backend reads where the host store has them, not from a copy of its own."""
        if self._executor is None:
            return []
        return [experts for layer, experts in self.store.layers.items() if not self._executor.cpu.copies(layer)]

    def health(self) -> Health:
        """What failed since the start, by accelerator, and what the fallback does; nothing before the start."""
        if self._recovery is None:
            return Health()
        return Health(self._recovery.health, self._watch.fallback_state if self._watch is not None else "off")

    def make_room(self, cause: Exception) -> bool:
        """Shrink the expert caches because the model's own work ran out of device memory, between two layer steps.

        False if there was nothing left to shrink. Emulated accelerators share the host's memory, and shrink as well.
        """
        if self._recovery is None or self._executor is None:
            return False
        shrunk = [self._recovery.make_room(lane, cause) for lane in self._executor.lanes]
        return any(shrunk)

    def describe(self) -> str:
        """One line: what was decided."""
        assert self._assembly is not None, "the runtime has started"
        return describe(self.options, self.store, self._assembly)

    @property
    def wants_scores(self) -> bool:
        """Whether anything uses the router's scores: without slots there is nothing to retain."""
        return self.recorder is not None or self.num_slots > 0

    def note_scores(self, layer: int, logits: torch.Tensor) -> None:
        """Keep the router's logits `[num_tokens, num_experts]` of the step about to reach `layer`'s experts."""
        self._scores[layer] = logits

    def look_ahead(self, layer: int, predict: Predict) -> None:
        """Register what predicts the routing of the layers after `layer`."""
        self._look_ahead[layer] = predict

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute one layer's experts: `hidden [num_tokens, hidden]`, routing `[num_tokens, top_k]`.

        Returns `[num_tokens, hidden]` in hidden's dtype and device, in memory of its own. Longer steps are
        computed in chunks of `max_chunk_tokens`. Reading the routing is the one synchronisation with the
        router's device.
        """
        if self._executor is None:
            self.start()
        logits = self._scores.pop(layer, None)
        home, device = hidden.device, self.device_of(layer)
        if device is not None and device != home:  # this layer's experts live on another accelerator than the model
            hidden, ids, weights = hidden.to(device), ids.to(device), weights.to(device)
            logits = None if logits is None else logits.to(device)
            return self._run_chunks(layer, hidden, ids, weights, logits).to(home)
        return self._run_chunks(layer, hidden, ids, weights, logits)

    def device_of(self, layer: int) -> torch.device | None:
        """Where a layer's experts take their hidden states; None if they come from wherever the model is."""
        lane = self._executor.lane(layer) if self._executor else None
        return None if lane is None else lane.accelerator.device

    def _run_chunks(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        size = self.options.max_chunk_tokens
        if self.recorder is not None and hidden.shape[0] > size:
            raise ConfigError(
                f"a recorded step has {hidden.shape[0]} tokens, one plan computes at most {size}; "
                f"give max_chunk_tokens of at least that, or shorter steps"
            )
        if self._decides_nothing(layer, min(hidden.shape[0], size)):
            return self._run_whole(layer, hidden, ids, weights)
        if hidden.shape[0] <= size:
            return self._run_chunk(layer, hidden, ids, weights, logits)
        result = torch.empty_like(hidden)
        for at in range(0, hidden.shape[0], size):
            chunk = slice(at, at + size)
            result[chunk] = self._run_chunk(
                layer, hidden[chunk], ids[chunk], weights[chunk], None if logits is None else logits[chunk]
            )
        return result

    def _decides_nothing(self, layer: int, num_tokens: int) -> bool:
        """Whether nothing depends on what is routed: neither this layer's plan nor what to prefetch, nor a record."""
        assert self.coordinator is not None and self._executor is not None, "started above"
        decides_nothing = self.coordinator.decides_nothing
        if not decides_nothing(layer, num_tokens) or self.recorder is not None or self._log is not None:
            return False
        lane = self._executor.lane(layer)
        if lane is None or not lane.gpu.finds_routed:
            return False
        predict = self._predict(layer)
        return predict is None or all(decides_nothing(later, num_tokens) for later in predict.layers)

    def _run_whole(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute a step of which nothing is read; in chunks, as the buffers are that long."""
        assert self.coordinator is not None and self._executor is not None, "started above"
        assert self._recovery is not None, "started above"
        began, size, out = time.perf_counter(), self.options.max_chunk_tokens, []
        for part in zip(hidden.split(size), ids.split(size), weights.split(size), strict=True):
            slot_of = self.coordinator.pass_over(layer, len(part[0]))
            try:
                out.append(self._executor.run_whole(layer, slot_of, *part))
            except AcceleratorFailed as failure:
                self._recovery.recover(failure)
                out.append(self._executor.compute_on_cpu(layer, Step.on_host(*part, None)))
            self.seconds.steps += 1
        self.seconds.submit_and_gpu += time.perf_counter() - began
        return out[0] if len(out) == 1 else torch.cat(out)

    def statistics(self) -> dict[str, float]:
        """Every counter since the start, by name; nothing before it. Waits for what was counted on a device."""
        if self.coordinator is None or self._executor is None:
            return {}
        with self._counting:  # a server's metrics are read while it answers
            for lane in self._executor.lanes:
                for layer, routed in lane.whole.routed().items():
                    self.coordinator.note_hits(layer, routed.counts, routed.last)
            return self.coordinator.stats.snapshot()

    def _run_chunk(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.coordinator is not None and self._executor is not None, "started above"
        seconds, now = self.seconds, time.perf_counter
        began = now()
        step = self._read(layer, hidden, ids, weights, logits if self.wants_scores else None)
        read = now()
        routing = routing_of(layer, step.host_ids, step.host_weights, step.scores)
        plan = self.coordinator.plan(routing)
        planned = now()
        if self._log is not None:
            self._log.planned(plan, routing.num_tokens, read, planned)
        try:
            self._executor.abort(self.coordinator.take_aborted())
            self._executor.end_streams(self.coordinator.take_closed())
            self._executor.start(plan, step)
            predict = self._predict(layer)
            if predict is not None:
                self._executor.look_ahead(layer, step, predict)
            started = now()
            chosen = self._prefetch(layer, step)
            prefetched = now()
            if self._log is not None and chosen is not None:
                self._log.chose(layer, chosen, started, prefetched)
            out = self._executor.join(plan, step)
        except AcceleratorFailed as failure:
            out = self._recover(failure, plan, step)
            started = prefetched = now()
        except BaseException:
            self._abandon(plan)
            raise
        else:
            if self._watch is not None:
                self._watch.step(plan, read, learns=routing.num_tokens == 1 and self.recorder is None)
            self.coordinator.finish(plan)
            self._executor.end_streams(self.coordinator.take_closed())
        if self.recorder is not None:
            guesses = self._executor.guesses(layer, step)
            if guesses is None and layer in self._look_ahead:  # nobody prefetches here, but a replay may
                guesses = ask(self._look_ahead[layer], step.hidden, step.ids)
            record(self.recorder, routing, step, logits, guesses)
        seconds.read += read - began
        seconds.plan += planned - read
        seconds.submit_and_gpu += started - planned
        seconds.prefetch += prefetched - started
        ended = now()
        seconds.wait += ended - prefetched
        seconds.steps += 1
        if self._log is not None:
            self._log.finished(ended)
        return out

    def _read(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> Step:
        assert self._executor is not None and self._recovery is not None, "the runtime has started"
        scores = None if logits is None else self._kept(mean_probabilities(logits))
        try:
            step = self._executor.read(layer, hidden, ids, weights, scores)
        except AcceleratorFailed as failure:
            self._recovery.recover(failure)
            step = Step.on_host(hidden, ids, weights, scores)
        if not math.isfinite(step.host_hidden.sum().item()) and not step.host_hidden.isfinite().all():
            raise KernelError(f"hidden states entering the experts of layer {layer} are not finite (NaN or infinity)")
        return step

    def _predict(self, layer: int) -> Predict | None:
        wanted = (self.options.prefetch_size > 0 and self.num_slots > 0) or self.recorder is not None
        return self._look_ahead.get(layer) if wanted else None

    def _kept(self, probabilities: torch.Tensor) -> torch.Tensor:
        """As a recording keeps them, if there is one: a replay then decides on the very same numbers."""
        return probabilities if self.recorder is None else halved(probabilities)

    def _recover(self, failure: AcceleratorFailed, plan: Plan, step: Step) -> torch.Tensor:
        """Compute the step on the CPU, and leave slots and cache as if the accelerator had not been asked."""
        assert self.coordinator is not None and self._executor is not None, "a plan was made"
        assert self._recovery is not None, "a plan was made"
        self.coordinator.finish(plan)
        self._recovery.recover(failure, plan)
        return self._executor.compute_on_cpu(plan.layer, step)

    def _abandon(self, plan: Plan) -> None:
        """Leave nothing half done after an error that the step cannot survive."""
        assert self.coordinator is not None and self._recovery is not None, "a plan was made"
        self.coordinator.finish(plan)
        self._recovery.abandon(plan)

    def _prefetch(self, layer: int, step: Step) -> tuple[Transfer, ...] | None:
        """Start transfers for later layers, by what the gates guess of their routing; None where nothing may be."""
        if not self.options.prefetch_size or not self.num_slots:
            return None
        assert self.coordinator is not None and self._executor is not None, "a plan was made"
        guesses = self._executor.guesses(layer, step)
        predictions: Sequence[Routing] = ()
        if guesses is not None:
            predictions = predicted_routing(guesses, self._kept(guesses.scores))
        transfers = self.coordinator.prefetch(layer, predictions)
        self._executor.abort(self.coordinator.take_aborted())
        self._executor.prefetch(transfers)
        return transfers
