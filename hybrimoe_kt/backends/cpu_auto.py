"""CPU experts by whichever library is faster here: chosen by layer, and for few and many tokens apart.

ggml computes everything. kt-kernel is asked where `hybrimoe calibrate` measured it to be faster, for layers that it
reads in place: never where it would need a copy that ggml does without.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch

from hybrimoe_kt.device.backend import CandidateSeconds, CpuBackend, Routed
from hybrimoe_kt.device.calibrate import COMPARED_LOADS
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.quants import QuantType

from .cpu_ggml import GgmlBackend
from .cpu_llamafile import LlamafileBackend, LlamafileTwiceBackend
from .torch_reference import TorchReferenceCpu

__all__ = ["CANDIDATES", "AutoBackend", "candidates_for", "chosen", "in_words", "left_to_torch", "set_aside"]

logger = logging.getLogger(__name__)

_KINDS: dict[str, type[CpuBackend]] = {
    "ggml": GgmlBackend,
    "llamafile": LlamafileBackend,
    "llamafile presented twice": LlamafileTwiceBackend,
}
"""In order of preference while nothing was measured."""
CANDIDATES = tuple(_KINDS)
_WORTH_SPINNING = 0.8
"""Of the preferred candidate's time, what another may take at most to be asked: kt-kernel's threads spin for 50 ms
after a call, on cores that dense layers want, which no comparison of experts alone sees. Assumed, not measured."""
_LAST_RESORT = TorchReferenceCpu


class AutoBackend(CpuBackend):
    """Hands each step on to one of its candidates; one call in flight."""

    name = "auto"
    answers_pairs = False
    takes_int32 = True

    def __init__(self, num_threads: int, max_tokens: int) -> None:
        self.num_threads, self.max_tokens = num_threads, max_tokens
        self._made: dict[str, CpuBackend] = {}
        self._layers: dict[int, LayerExperts] = {}
        self._added: set[tuple[str, int]] = set()
        self._table: dict[int, dict[int, CpuBackend]] = {}
        """Layer -> load of `COMPARED_LOADS` -> who computes."""
        self._seconds: CandidateSeconds = {}
        self._at_work: CpuBackend | None = None

    @property
    def spinning_threads(self) -> int:  # type: ignore[override]
        """Of those that are asked; what was only made to be compared has stopped by then."""
        at_work = {backend for table in self._table.values() for backend in table.values()}
        return max((backend.spinning_threads for backend in at_work), default=0)

    @classmethod
    def types(cls) -> tuple[QuantType, ...]:
        usable = [kind for kind in _KINDS.values() if kind.unusable() is None] or [_LAST_RESORT]
        found = {row.number: row for kind in usable for row in kind.types()}
        return tuple(found[number] for number in sorted(found))

    @classmethod
    def copied_bytes(cls, experts: LayerExperts) -> int:
        kind = _KINDS.get(candidates_for(experts)[0], _LAST_RESORT)
        return kind.copied_bytes(experts)

    @classmethod
    def serves(cls, experts: LayerExperts) -> str:
        """Return the name of who computes these experts while nothing is measured."""
        return candidates_for(experts)[0]

    def add_layer(self, experts: LayerExperts) -> None:
        """Take a layer's experts; where no library computes their types, plain torch does, with a warning."""
        layer, name = experts.layer, self.serves(experts)
        self._layers[layer] = experts
        if reason := left_to_torch(experts):
            _warn_once(reason)
        self._table[layer] = dict.fromkeys(COMPARED_LOADS, self._with(name, layer))

    def copies(self, layer: int) -> bool:
        return any(backend.copies(layer) for backend in set(self._table[layer].values()))

    def candidates(self) -> Mapping[str, CpuBackend]:
        """ggml and kt-kernel, this in both its ways, each with the layers that it would be asked for."""
        for layer, experts in self._layers.items():
            for name in candidates_for(experts):
                self._with(name, layer)
        return {name: self._made[name] for name in _KINDS if name in self._made}

    def choose(self, seconds: CandidateSeconds) -> None:
        """Take measurements under the names of `candidates`; those of others are left aside."""
        self._seconds = seconds
        for layer, experts in self._layers.items():
            for load, name in zip(COMPARED_LOADS, chosen(seconds, candidates_for(experts)), strict=True):
                self._table[layer][load] = self._with(name, layer)

    def describe(self) -> str:
        """Who computes how many tokens an expert, and whether that was measured."""
        kinds = {tuple(backend.name for backend in table.values()) for table in self._table.values()}
        return f"auto: {'; '.join(sorted(map(in_words, kinds)))}{', measured' if self._seconds else ''}"

    def submit(self, layer: int, routed: Routed) -> None:
        if self._at_work is not None:
            raise KernelError("a CPU expert call is still in flight; wait for it before submitting another")
        backend = self._backend(layer, routed)
        backend.submit(layer, routed if backend.takes_int32 else routed.with_long_ids())
        self._at_work = backend

    def compute(self, layer: int, routed: Routed) -> torch.Tensor | None:
        backend = self._backend(layer, routed)
        return backend.compute(layer, routed if backend.takes_int32 else routed.with_long_ids())

    def is_done(self) -> bool:
        return self._at_work is None or self._at_work.is_done()

    def wait(self) -> torch.Tensor:
        at_work, self._at_work = self._at_work, None
        assert at_work is not None, "something was submitted"
        answer = at_work.wait()
        return answer.sum(dim=1) if at_work.answers_pairs else answer

    def _backend(self, layer: int, routed: Routed) -> CpuBackend:
        """Who is fastest at the tokens that an expert has on average."""
        table, num_tokens = self._table[layer], routed.hidden.shape[0]
        if num_tokens == 1:
            return table[1]
        load = num_tokens * routed.ids.shape[1] // self._layers[layer].num_experts
        return table[max(known for known in COMPARED_LOADS if known <= max(2, load))]

    def _with(self, name: str, layer: int) -> CpuBackend:
        """The candidate of that name, made once, with that layer."""
        if name not in self._made:
            kind = _KINDS.get(name, _LAST_RESORT)
            most = kind.default_threads(beside_accelerator=False)
            threads = min(self.num_threads, most) if kind is not GgmlBackend else self.num_threads
            self._made[name] = kind(threads, self.max_tokens)
        backend = self._made[name]
        if (name, layer) not in self._added:
            self._added.add((name, layer))
            backend.add_layer(self._layers[layer])
        return backend


def candidates_for(experts: LayerExperts) -> list[str]:
    """Who computes these experts, the preferred first; plain torch where nobody else does."""
    usable = [name for name, kind in _KINDS.items() if kind.unusable() is None and kind.refuses(experts) is None]
    in_place = [name for name in usable if _KINDS[name].copied_bytes(experts) == 0]
    return in_place or usable or [_LAST_RESORT.name]


def left_to_torch(experts: LayerExperts) -> str | None:
    """Return why no library computes these experts; None where one does."""
    if candidates_for(experts) != [_LAST_RESORT.name]:
        return None
    return "; ".join(dict.fromkeys(set_aside(experts).values()))


def set_aside(experts: LayerExperts) -> dict[str, str]:
    """Why each candidate that is not among these experts' is not."""
    names = candidates_for(experts)
    return {
        name: kind.unusable() or kind.refuses(experts) or f"{name} would need a copy of these experts"
        for name, kind in _KINDS.items()
        if name not in names
    }


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("experts are dequantised and multiplied by plain torch on the CPU, many times slower: %s", reason)


def chosen(seconds: CandidateSeconds, names: Sequence[str]) -> list[str]:
    """Who of `names` computes at each load of `COMPARED_LOADS`: the first, unless another is faster by much."""
    found = []
    for load in COMPARED_LOADS:
        known = {name: seconds[name][load] for name in names if load in seconds.get(name, {})}
        best = min(known, key=known.__getitem__, default=names[0])
        stays = names[0] in known and known[best] > _WORTH_SPINNING * known[names[0]]
        found.append(names[0] if stays else best)
    return found


def in_words(names: Iterable[str]) -> str:
    """ "ggml", or "ggml up to 7 tokens an expert, llamafile from 8": of names by load of `COMPARED_LOADS`."""
    runs = list(zip(names, COMPARED_LOADS, strict=False))
    starts = [run for before, run in itertools.pairwise([("", 0), *runs]) if run[0] != before[0]]
    words, unit = [], " tokens an expert"
    for (name, _), (_, load) in itertools.pairwise(starts):
        words.append(f"{name} for one token" if load == 2 else f"{name} up to {load - 1}{unit}")
        unit = unit if load == 2 else ""
    name, load = starts[-1]
    return ", ".join([*words, f"{name} from {load}{unit}" if words else name])
