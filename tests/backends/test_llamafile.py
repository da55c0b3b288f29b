"""kt-kernel against the reference, and every input that it would crash or lie on refused before it sees it."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch

from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import KernelError, ModelError
from tests.support.expert_layers import BAD_CALLS, HIDDEN, MAX_TOKENS, answers, layer, reference, step
from tests.support.random_blocks import Type

pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
from hybrimoe_kt.backends.cpu_llamafile import LlamafileBackend

# Relative error of a layer's output, |difference| / |reference|, doubled from what was measured on AVX2:
# F16 0.0017, Q8_0, Q4_0 and Q5_0 0.013, K-quants 0.018.
TOLERANCE = {Type.F16: 0.004, Type.F32: 0.004, Type.Q8_0: 0.026, Type.Q4_0: 0.026, Type.Q5_0: 0.026}


def both(experts: LayerExperts, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    backend = LlamafileBackend(1, MAX_TOKENS)
    backend.add_layer(experts)
    return answers(backend, experts, *inputs), reference(experts, *inputs)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 17, 32])
@pytest.mark.parametrize(
    "kind", [Type.F16, Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name
)
def test_equals_the_reference(kind: Type, num_tokens: int) -> None:
    found, wanted = both(layer(kind), *step(num_tokens))
    assert (found - wanted).norm() <= TOLERANCE.get(kind, 0.036) * wanted.norm()
    assert wanted.norm() > 0


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_width_that_needs_padding(num_tokens: int) -> None:
    found, wanted = both(layer(Type.Q4_K, inter=384, down=Type.Q5_0), *step(num_tokens))
    assert (found - wanted).norm() <= 0.036 * wanted.norm()


def test_weights_are_used_in_place() -> None:
    """No copy: what changes in the mapping changes the result."""
    experts = layer(Type.Q8_0)
    backend = LlamafileBackend(1, MAX_TOKENS)
    backend.add_layer(experts)
    hidden, ids, weights = step(1, skipped=0)
    backend.submit(0, Routed(hidden, ids, weights))
    before = backend.wait().clone()
    experts.down.data.zero_()
    backend.submit(0, Routed(hidden, ids, weights))
    assert before.abs().max() > 0
    assert backend.wait().abs().max() == 0


def test_nothing_routed_here_gives_zeros() -> None:
    hidden, ids, weights = step(4)
    found, _ = both(layer(), hidden, torch.full_like(ids, -1), weights)
    assert found.abs().max() == 0


def test_many_layers_and_lengths_share_one_set_of_buffers() -> None:
    backend, layers = LlamafileBackend(1, MAX_TOKENS), [layer(Type.Q8_0, number=number) for number in range(3)]
    for experts in layers:
        backend.add_layer(experts)
    for seed, (experts, num_tokens) in enumerate([(layers[0], 32), (layers[1], 1), (layers[2], 9), (layers[0], 1)]):
        inputs = step(num_tokens, seed=seed)
        backend.submit(experts.layer, Routed(*inputs))
        found = backend.wait().clone()
        wanted = both(experts, *inputs)[1]
        assert (found - wanted).norm() <= 0.026 * wanted.norm()


HIDDEN_2, IDS_2, WEIGHTS_2 = step(2, skipped=0)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_input_that_the_kernel_gets_wrong_is_refused(case: str) -> None:
    inputs, message = BAD_CALLS[case]
    backend = LlamafileBackend(1, MAX_TOKENS)
    backend.add_layer(layer())
    with pytest.raises(KernelError, match=message):
        backend.submit(0, Routed(*inputs))
    backend.submit(0, Routed(HIDDEN_2, IDS_2, WEIGHTS_2))
    assert backend.wait().abs().max() > 0, "a refused call must leave the backend usable"


def test_int32_ids_are_not_for_this_kernel() -> None:
    backend = LlamafileBackend(1, MAX_TOKENS)
    backend.add_layer(layer())
    assert not backend.takes_int32
    with pytest.raises(KernelError, match="wanted int64 and float32"):
        backend.submit(0, Routed(HIDDEN_2, IDS_2.int(), WEIGHTS_2))


def test_a_second_call_in_flight_is_refused() -> None:
    backend = LlamafileBackend(1, MAX_TOKENS)
    backend.add_layer(layer())
    backend.submit(0, Routed(HIDDEN_2, IDS_2, WEIGHTS_2))
    with pytest.raises(KernelError, match="still in flight"):
        backend.submit(0, Routed(HIDDEN_2, IDS_2, WEIGHTS_2))
    backend.wait()


def test_non_contiguous_input_is_read_as_it_looks() -> None:
    hidden, ids, weights = step(4)
    spread = torch.empty(4, 2 * HIDDEN)[:, ::2].copy_(hidden)
    found, wanted = both(layer(), spread, ids.t().contiguous().t(), weights.t().contiguous().t())
    assert (found - wanted).norm() <= 0.026 * wanted.norm()


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (lambda: layer(Type.BF16), "gate experts are BF16"),
        (lambda: layer(Type.Q8_0, down=Type.Q5_1), "down experts are Q5_1"),
        (lambda: layer(Type.Q8_0, hidden=320), "hidden size 320 is not a multiple of 256"),
    ],
    ids=["gate type", "down type", "hidden size"],
)
def test_layers_that_the_kernel_gets_wrong_are_refused(experts: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LlamafileBackend(1, MAX_TOKENS).add_layer(experts())


def test_calls_leave_no_memory_behind() -> None:
    """Some hundred calls, counted by the allocator itself: kt-kernel keeps what every new task takes."""

    class Allocated(ctypes.Structure):
        names = (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        pytest.skip("this C library does not tell what is allocated")
    tell.restype = Allocated
    backend = LlamafileBackend(1, MAX_TOKENS)
    backend.add_layer(layer())

    def calls() -> int:
        for number in range(250):
            backend.submit(0, Routed(*step(1 + number % 3, seed=number)))
            backend.wait()
        gc.collect()
        return int(tell().uordblks)

    calls()
    assert min(calls() - before for before in (calls(), calls())) < 10_000
