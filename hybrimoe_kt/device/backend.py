"""What the executor expects of whatever computes experts.

Both sides see the same step, each on its own device, where an id of -1 means "not yours" and weights are float32. An
answer is either the weighted *sum* `[num_tokens, hidden]` or, from a backend whose results must not depend on who
computed what, the weighted *pairs* `[num_tokens, top_k, hidden]`, zero where the id is -1. Answers are float32.

A backend inherits from one of the protocols and so takes what they answer by themselves; what is asked of the class,
before one is made, has to be cheap. `backends.registry` knows them by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from hybrimoe_kt.core.types import Phase
from hybrimoe_kt.quants import TYPES, QuantType

from .cores import default_expert_threads
from .experts import LayerExperts
from .layout import SlotLayout

__all__ = ["CandidateSeconds", "CpuBackend", "GpuBackend", "KernelRow", "Routed"]


class Routed(NamedTuple):
    """What a model hands over for one layer step, on the model's device.

    `hidden [num_tokens, hidden]` in the model's dtype, `ids` int64 or int32 and `weights` `[num_tokens, top_k]`; the
    router's `logits [num_tokens, num_experts]` where it has any, with their softmax in float32 as `probabilities` where
    that is known, and the step's `phase` where one token a step says too little. Backends are given int64 ids, but for
    those that take int32 as well.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None = None
    phase: Phase | None = None
    probabilities: torch.Tensor | None = None

    def with_long_ids(self) -> Routed:
        """The same with ids as int64 where they are int32."""
        return self._replace(ids=self.ids.long()) if self.ids.dtype is torch.int32 else self

    def to(self, device: torch.device) -> Routed:
        """The same on another device."""
        logits = None if self.logits is None else self.logits.to(device)
        return Routed(self.hidden.to(device), self.ids.to(device), self.weights.to(device), logits, self.phase)

    def split(self, size: int) -> list[Routed]:
        """The same in pieces of at most `size` tokens; prefill unless said otherwise, also a last token alone."""
        phase = self.phase or "prefill"
        places = [slice(at, at + size) for at in range(0, self.hidden.shape[0], size)]
        return [
            Routed(
                self.hidden[place],
                self.ids[place],
                self.weights[place],
                None if self.logits is None else self.logits[place],
                phase,
            )
            for place in places
        ]


class KernelRow(NamedTuple):
    """Which kernels read one matrix of an expert."""

    tensor: str
    type_name: str
    decode: str
    prefill: str


CandidateSeconds = Mapping[str, Mapping[int, float]]
"""Candidate -> tokens an expert has -> seconds of that expert in one call, on one machine, of the same experts."""


class CpuBackend(Protocol):
    """Computes experts from host memory, beside the accelerator. One call in flight at a time."""

    name: str
    answers_pairs: bool
    spinning_threads: int = 0
    """How many of its threads keep their cores between calls."""
    for_one_token: bool = False
    """Whether it is another candidate's twin for all but single tokens, so that more need not be compared."""
    takes_int32: bool = False
    """Whether ids may be int32 as well as int64."""

    def __init__(self, num_threads: int, max_tokens: int) -> None:
        """`max_tokens` bounds one call."""

    @classmethod
    def unusable(cls) -> str | None:
        """Return why it cannot run on this machine, None when it can."""
        return None

    @classmethod
    def types(cls) -> tuple[QuantType, ...]:
        """The types that it computes."""
        return tuple(TYPES.values())

    @classmethod
    def refuses(cls, experts: LayerExperts) -> str | None:
        """Return why it cannot compute these experts, one sentence that says what to do; None when it can."""
        return None

    @classmethod
    def default_threads(cls, *, beside_accelerator: bool) -> int:
        """How many threads it is made with where nobody says."""
        return default_expert_threads(beside_accelerator=beside_accelerator)

    def candidates(self) -> Mapping[str, CpuBackend]:
        """Backends among which this one chooses by what they take, see `choose`; each with its layers."""
        return {}

    def choose(self, seconds: CandidateSeconds) -> None:
        """Take what each candidate was measured to take; by default nothing depends on it."""
        return

    def describe(self) -> str:
        """What computes, in a few words."""
        return self.name

    @classmethod
    def copied_bytes(cls, experts: LayerExperts) -> int:
        """Bytes of the host copy that it makes of a layer, beside the mapped file."""
        return 0

    @abstractmethod
    def add_layer(self, experts: LayerExperts) -> None:
        """Take a layer's experts; ModelError for those that it `refuses`."""

    def copies(self, layer: int) -> bool:
        """Whether it keeps a host copy of that layer's experts of its own, beside the mapped file."""
        return False

    @abstractmethod
    def submit(self, layer: int, routed: Routed) -> None:
        """Start computing; inputs (hidden float32, on the host) stay unchanged until `wait` returns.

        KernelError on input it would get wrong.
        """

    def compute(self, layer: int, routed: Routed) -> torch.Tensor | None:
        """Do all of it in the calling thread, where nobody has anything else to do meanwhile.

        Returns the answer in memory of its own; None, having done nothing, where that is no faster, and then `submit`
        is asked. The caller has seen that the hidden states are finite, which is not looked at again.
        """
        return None

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the submitted call has ended; never blocks."""

    @abstractmethod
    def wait(self) -> torch.Tensor:
        """Return the ended call's answer, in a buffer valid until the next submit. Call it once `is_done`."""


class GpuBackend(Protocol):
    """Computes experts from their slots' bytes, on the slots' device. Everything it does is asynchronous there."""

    name: str
    answers_pairs: bool
    """Whether `out` is `[num_tokens, top_k, hidden]` (pairs) rather than `[num_tokens, hidden]` (sum)."""
    finds_routed: bool
    """Whether a launch costs what is routed and not what is in `slots`, so that all of a layer may be named."""
    decides_on_device: bool = False
    """Whether a launch of one token enqueues the same whatever is in `slots`, so that it can be captured once."""

    @classmethod
    def unusable(cls, device: torch.device) -> str | None:
        """Return why it cannot run on `device`, None when it can."""
        return None

    @classmethod
    def types(cls) -> tuple[QuantType, ...]:
        """The types that it reads."""
        return tuple(TYPES.values())

    @classmethod
    def refuses(cls, experts: LayerExperts) -> str | None:
        """Return why no kernel here reads these experts ("down experts are MXFP4"), None when one does."""
        return None

    @classmethod
    def kernels(cls, experts: LayerExperts, capability: tuple[int, int] | str) -> list[KernelRow]:
        """Say what serves gate, up and down experts on a GPU: (8, 6) for CUDA, "gfx1100" for HIP."""
        return [KernelRow(role, matrix.type_name, cls.name, cls.name) for role, matrix in experts.named.items()]

    @classmethod
    def planned_bytes(cls, experts: LayerExperts, max_tokens: int, capability: tuple[int, int] | str) -> int:
        """Device memory that calls for this layer need beside its slots, before any is made; `capability` as above."""
        return 0

    @abstractmethod
    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        """Take note of a layer's types, shapes and slots, uint8 `[num_slots, slot_bytes]`.

        Called again for the same layer when its slots have moved. All workspace is allocated here or in `prepare`.
        """

    def prepare(self, max_tokens: int) -> None:
        """Allocate what calls of up to `max_tokens` tokens need, once, after every `add_layer`; by default nothing."""
        return

    @abstractmethod
    def launch(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        """Enqueue the experts of `slots`, pairs (expert, slot), and *add* their answer to `out`, float32.

        `slot_of` int32 `[num_experts]` on the device says the same as `slots`, -1 elsewhere, so that kernels need no
        host decision; it and all tensors are on the slots' device, hidden states float32, float16 or bfloat16. Pairs of
        experts not in `slots` are left alone. Returns before anything has run; never synchronises, never allocates
        from the driver. KernelError, before any launch, for a slot out of range.
        """

    def launch_first(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        """The same, where `out` holds nothing of this step yet: all else in it becomes zero."""
        out.zero_()
        self.launch(layer, slots, slot_of, routed, out)

    def launch_planned(
        self, layer: int, slot_of: torch.Tensor, routed: Routed, out: torch.Tensor, *, is_first: bool
    ) -> None:
        """The same for one token whose `slot_of` a kernel writes: nobody on the host knows what it says.

        For backends that `decides_on_device`. What `is_first` finds nothing in `out`.
        """
        assert self.decides_on_device, f"{self.name} is told by the host what to compute"
        (self.launch_first if is_first else self.launch)(layer, (), slot_of, routed, out)
