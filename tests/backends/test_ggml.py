"""Experts on ggml against the reference: every type that files hold, widths that no other kernel takes, odd steps."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrimoe_kt.backends.cpu_ggml import GgmlBackend
from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml.experts import ExpertGraph, ExpertKind, Scratch
from hybrimoe_kt.backends.ggml.pool import pool
from hybrimoe_kt.backends.ggml.products import dequantize_into, multiply
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import KernelError, ModelError
from tests.support.expert_layers import (
    BAD_CALLS,
    EXPERTS,
    HIDDEN,
    MAX_TOKENS,
    TOP_K,
    answers,
    floats,
    layer,
    reference,
    step,
)
from tests.support.packed import odd_width
from tests.support.random_blocks import KINDS, Type, random_blocks

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")

ROOT = Path(__file__).parents[2]
TOKENS = (1, 2, 3, 7, 17, 33)
FLOATS = (Type.F32, Type.F16, Type.BF16)

TOLERANCE = {Type.F32: 1e-5, Type.F16: 1e-3, Type.BF16: 6e-3}
"""Relative error of a layer's output, |difference| / |reference|; of blocks 0.035.

Measured at most 3e-7, 0.0005, 0.0033 and 0.027 (IQ4_NL with IQ4_XS) with ggml 0.20.2 on AVX2.
"""


def tolerance(experts: LayerExperts) -> float:
    return max(TOLERANCE.get(Type(matrix.ggml_type), 0.035) for matrix in experts.matrices)


def mixed(kind: Type, at: str) -> LayerExperts:
    """Experts of which gate, up or down is of `kind` and the others are types that come before and after it."""
    number = KINDS.index(kind)
    before, after = KINDS[number - 1], KINDS[(number + 1) % len(KINDS)]
    gate, up, down = {"gate": (kind, before, after), "up": (after, kind, before), "down": (before, after, kind)}[at]
    return layer(gate, up=up, down=down, hidden=odd_width(gate, up), inter=odd_width(down), number=number)


def backend_with(*layers: LayerExperts, threads: int = 2, max_tokens: int = MAX_TOKENS) -> GgmlBackend:
    backend = GgmlBackend(threads, max_tokens)
    for experts in layers:
        backend.add_layer(experts)
    return backend


def assert_close(found: torch.Tensor, wanted: torch.Tensor, within: float) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= within * wanted.norm()


def test_every_type_is_computed() -> None:
    assert {row.name for row in GgmlBackend.types()} >= {kind.name for kind in KINDS}


@pytest.mark.parametrize("at", ["gate", *(pytest.param(at, marks=pytest.mark.slow) for at in ("up", "down"))])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_equals_the_reference(kind: Type, at: str) -> None:
    experts = mixed(kind, at)
    backend, exact = backend_with(experts, max_tokens=max(TOKENS)), floats(experts)
    for tokens in TOKENS:
        for skipped in (0.0, 0.4):
            inputs = step(tokens, skipped, tokens, experts.hidden)
            wanted = reference(exact, *inputs)
            assert wanted.norm() > 0 or skipped
            assert_close(answers(backend, experts, *inputs), wanted, tolerance(experts))


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_floats_are_rounded_as_floats(kind: Type) -> None:
    experts = layer(kind, inter=37, hidden=50)
    backend, exact = backend_with(experts, max_tokens=max(TOKENS)), floats(experts)
    for tokens in TOKENS:
        inputs = step(tokens, 0.3, tokens, 50)
        assert_close(answers(backend, experts, *inputs), reference(exact, *inputs), TOLERANCE[kind])


@pytest.mark.parametrize("tokens", [1, 4])
def test_nothing_routed_here_gives_zeros(tokens: int) -> None:
    backend, experts = backend_with(layer()), layer()
    hidden, ids, weights = step(tokens)
    for _ in range(2):
        assert torch.equal(
            answers(backend, experts, hidden, torch.full_like(ids, -1), weights), torch.zeros(tokens, HIDDEN)
        )
        answers(backend, experts, *step(tokens, skipped=0))  # what it leaves behind is not seen


@pytest.mark.parametrize("tokens", [1, 5])
def test_one_expert_of_each_token(tokens: int) -> None:
    """Fewer places than the model routes to."""
    experts = layer(Type.Q4_K)
    hidden, ids, weights = step(tokens, skipped=0)
    for places in range(1, TOP_K + 1):
        inputs = hidden, ids[:, :places], weights[:, :places]
        assert_close(answers(backend_with(experts), experts, *inputs), reference(experts, *inputs), 0.035)


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_computed_here_or_beside_gives_the_same_bits(tokens: int) -> None:
    backend, experts = backend_with(layer(Type.Q5_K), max_tokens=33), layer(Type.Q5_K)
    for skipped in (0.0, 0.5, 1.0):
        inputs = step(tokens, skipped)
        here = backend.compute(0, Routed(*inputs)).clone()
        assert torch.equal(here, answers(backend, experts, *inputs))


def pairs(experts: LayerExperts, hidden: torch.Tensor, ids: torch.Tensor, threads: int) -> torch.Tensor:
    """Unweighted answers `[tokens, per_token, hidden]`."""
    graph, scratch = ExpertGraph(pool(threads), ExpertKind.of(experts), ids.shape[1], ids.shape[0]), Scratch()
    chosen = ids.to(torch.int32).contiguous()
    out = graph.place(tuple(matrix.data.data_ptr() for matrix in experts.matrices), hidden, chosen, scratch)
    graph.compute()
    return out.clone()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_pair_has_the_same_bits_in_whatever_call(kind: Type) -> None:
    """Alone, among others, and by one thread or two: how a step is cut changes nothing."""
    experts = mixed(kind, "up")
    hidden, ids, _ = step(17, skipped=0, hidden=experts.hidden)
    whole = pairs(experts, hidden, ids, 2)
    assert torch.equal(whole, pairs(experts, hidden, ids, 1))
    assert torch.equal(whole[:5], pairs(experts, hidden[:5].contiguous(), ids[:5], 2))
    assert torch.equal(whole[:, 1:2], pairs(experts, hidden, ids[:, 1:2], 2))
    for token in (0, 16):
        for place in range(TOP_K):
            alone = pairs(experts, hidden[token : token + 1], ids[token : token + 1, place : place + 1], 2)
            assert torch.equal(whole[token, place], alone[0, 0]), (token, place)


def test_weights_are_used_in_place() -> None:
    """No copy: what changes in the mapping changes the result."""
    experts = layer(Type.IQ4_NL, inter=96)
    backend, inputs = backend_with(experts), step(1, skipped=0)
    before = answers(backend, experts, *inputs)
    experts.down.data.zero_()
    assert before.abs().max() > 0
    assert answers(backend, experts, *inputs).abs().max() == 0


def test_layers_of_several_kinds_share_a_backend() -> None:
    layers = [layer(Type.Q8_0, number=0), layer(Type.Q8_0, number=1), layer(Type.Q4_K, inter=512, number=2)]
    backend = backend_with(*layers)
    for seed, (number, tokens) in enumerate([(0, 32), (1, 1), (2, 9), (0, 1), (1, 32), (2, 1)]):
        inputs = step(tokens, seed=seed)
        assert_close(answers(backend, layers[number], *inputs), reference(layers[number], *inputs), 0.035)


def test_an_answer_stays_until_the_next_step() -> None:
    experts = layer()
    backend, inputs = backend_with(experts), step(7)
    backend.submit(0, Routed(*inputs))
    answer = backend.wait()
    kept = answer.clone()
    backend.compute(0, Routed(*step(1)))
    assert torch.equal(answer, kept), "of this backend, even longer"


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_int32_ids_give_the_same_bits(tokens: int) -> None:
    experts = layer(Type.Q4_K)
    backend = backend_with(experts)
    for skipped in (0.0, 0.5):
        hidden, ids, weights = step(tokens, skipped)
        wanted = answers(backend, experts, hidden, ids, weights)
        assert torch.equal(answers(backend, experts, hidden, ids.int(), weights), wanted)
        assert torch.equal(backend.compute(0, Routed(hidden, ids.int(), weights)), wanted)


def test_a_token_is_read_where_it_stands_and_answered_in_memory_of_its_own() -> None:
    """Hidden states are a row of a buffer that is written again; ids and weights are numbers by then."""
    experts, rows, answered = layer(Type.Q5_K), torch.empty(3, HIDDEN), []
    backend = backend_with(experts)
    for seed in range(4):
        hidden, ids, weights = step(1, skipped=0, seed=seed)
        rows[1:2] = hidden
        found = backend.compute(0, Routed(rows[1:2], ids, weights))
        answered.append((found, answers(backend, experts, hidden, ids, weights)))
    assert all(torch.equal(found, wanted) for found, wanted in answered)


UNSEEN = ("NaN", "infinity")
"""What `compute` leaves to its caller."""


@pytest.mark.parametrize(
    ("case", "method"), [(case, how) for case in BAD_CALLS for how in ("submit", "compute")[: 1 + (case not in UNSEEN)]]
)
def test_input_that_the_kernel_gets_wrong_is_refused(case: str, method: str) -> None:
    inputs, message = BAD_CALLS[case]
    experts = layer()
    backend = backend_with(experts)
    with pytest.raises(KernelError, match=message):
        getattr(backend, method)(0, Routed(*inputs))
    good = step(2, skipped=0)
    assert_close(answers(backend, experts, *good), reference(experts, *good), 0.035)


BAD_TOKENS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "NaN weight": ({"weights": torch.tensor([[0.5, float("nan"), 0.1]])}, "not finite"),
    "infinite weights": ({"weights": torch.tensor([[float("inf"), float("-inf"), 0.1]])}, "not finite"),
    "int16 ids": ({"ids": torch.tensor([[0, 1, 2]]).short()}, "ids are torch.int16"),
    "bf16 weights": ({"weights": torch.ones(1, 3).bfloat16()}, "weights torch.bfloat16"),
    "bf16 hidden": ({"hidden": torch.zeros(1, HIDDEN).bfloat16()}, "wanted float32"),
    "wrong width": ({"hidden": torch.zeros(1, HIDDEN + 256)}, "wanted float32"),
    "one dimension": ({"ids": torch.tensor([0, 1, 2]), "weights": torch.ones(3)}, "routing is"),
    "top_k too large": ({"ids": torch.arange(8)[None], "weights": torch.ones(1, 8)}, "at most 3"),
    "none": ({"ids": torch.empty(1, 0).long(), "weights": torch.empty(1, 0)}, "at most 3"),
    "expert out of range": ({"ids": torch.tensor([[0, 8, 1]])}, "expert 8 routed in layer 0"),
    "int32 out of range": ({"ids": torch.tensor([[0, 2**31 - 1, 1]]).int()}, "expert 2147483647 routed in layer 0"),
    "negative id": ({"ids": torch.tensor([[0, -2, 1]])}, "expert -2 routed in layer 0"),
    "duplicate": ({"ids": torch.tensor([[4, 5, 4]])}, "names the same expert twice"),
    "two tokens' ids": ({"ids": torch.tensor([[0, 1, 2], [0, 1, 2]]), "weights": torch.ones(2, 3)}, "routing is"),
}


@pytest.mark.parametrize("method", ["submit", "compute"])
@pytest.mark.parametrize("case", BAD_TOKENS)
def test_a_token_that_the_kernel_gets_wrong_is_refused(case: str, method: str) -> None:
    changes, message = BAD_TOKENS[case]
    experts = layer()
    backend, good = backend_with(experts), Routed(*step(1, skipped=0))
    with pytest.raises(KernelError, match=message):
        getattr(backend, method)(0, good._replace(**changes))
    assert_close(backend.compute(0, good), reference(experts, *good[:3]), 0.035)


@pytest.mark.parametrize("method", ["submit", "compute"])
def test_a_second_call_in_flight_is_refused(method: str) -> None:
    experts, inputs = layer(), step(2, skipped=0)
    backend = backend_with(experts)
    backend.submit(0, Routed(*inputs))
    with pytest.raises(KernelError, match="still in flight"):
        getattr(backend, method)(0, Routed(*step(1)))
    assert_close(backend.wait(), reference(experts, *inputs), 0.035)


def test_non_contiguous_input_is_read_as_it_looks() -> None:
    hidden, ids, weights = step(4)
    spread = torch.empty(4, 2 * HIDDEN)[:, ::2].copy_(hidden)
    inputs = spread, ids.t().contiguous().t(), weights.t().contiguous().t()
    found = answers(backend_with(layer()), layer(), *inputs)
    assert torch.equal(found, answers(backend_with(layer()), layer(), hidden, ids, weights))


def test_layers_that_it_cannot_compute_are_refused() -> None:
    experts = layer(Type.Q8_0)
    raw = torch.zeros(EXPERTS, 256 * 292, dtype=torch.uint8)
    with pytest.raises(ModelError, match="layer 0: up experts are Q8_K, which ggml's CPU kernels do not compute"):
        backend_with(_with_up(experts, ExpertMatrix(raw, int(Type.Q8_K), 256, 256)))
    spread = torch.zeros(EXPERTS, 2 * experts.up.num_bytes, dtype=torch.uint8)[:, ::2]
    with pytest.raises(ModelError, match="layer 0: up experts are not contiguous"):
        backend_with(_with_up(experts, ExpertMatrix(spread, int(Type.Q8_0), 256, 256)))


def _with_up(experts: LayerExperts, up: ExpertMatrix) -> LayerExperts:
    return LayerExperts(0, EXPERTS, TOP_K, HIDDEN, 256, experts.gate, up, experts.down)


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_fails_beside_comes_out_of_wait(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    experts, inputs = layer(), step(tokens)
    backend = backend_with(experts)
    with monkeypatch.context() as broken:
        broken.setattr(ggml.library(), "ggml_graph_compute", lambda graph, plan: 1)
        backend.submit(0, Routed(*inputs))
        with pytest.raises(KernelError, match="ggml ended a computation with status 1"):
            backend.wait()
    assert_close(answers(backend, experts, *inputs), reference(experts, *inputs), 0.035)


def test_a_thread_ends_with_its_backend() -> None:
    before = threading.active_count()
    for _ in range(3):
        answers(backend_with(layer()), layer(), *step(2))
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "experts on ggml" and threading.active_count() > before:
            thread.join(5)
    assert threading.active_count() <= before


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_threads_do_not_disturb_each_other() -> None:
    """Products of one shape, dequantisation and experts at once: each thread gets what it gets alone."""
    random = np.random.default_rng(0)
    experts = layer(Type.Q4_K)
    backend, inputs = backend_with(experts), step(3)
    wanted = answers(backend, experts, *inputs)
    failures: list[str] = []

    def multiplies(number: int) -> None:
        weight = torch.from_numpy(random_blocks(random, Type.Q8_0, 64, 96))
        given, out, values = torch.randn(2, 96), torch.empty(2, 64), torch.empty(64, 96)
        exact = dequantize(weight.flatten(), int(Type.Q8_0), (64, 96))
        for at in range(60):
            out.zero_()
            multiply(weight.data_ptr(), int(Type.Q8_0), 64, 96, given, out)
            dequantize_into(weight.data_ptr(), int(Type.Q8_0), 64, 96, values)
            if (out - given @ exact.t()).norm() > 0.035 * out.norm() or not torch.equal(values, exact):
                failures.append(f"product {at} of thread {number}")
                return

    def computes() -> None:
        for at in range(60):
            if not torch.equal(answers(backend, experts, *inputs), wanted):
                failures.append(f"experts {at}")
                return

    threads = [threading.Thread(target=multiplies, args=(number,)) for number in range(2)]
    threads.append(threading.Thread(target=computes))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


_ENDS = """
import gc, sys, torch
from hybrimoe_kt.backends.cpu_ggml import GgmlBackend
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts

def matrix():
    return ExpertMatrix(torch.zeros(8, 2048 * 64 * 34, dtype=torch.uint8), 8, 2048, 2048)

backend = GgmlBackend(1, 256)
backend.add_layer(LayerExperts(0, 8, 3, 2048, 2048, matrix(), matrix(), matrix()))
ids = torch.rand(256, 8).argsort(dim=1)[:, :3]
backend.submit(0, Routed(torch.randn(256, 2048), ids, torch.rand(256, 3)))
assert not backend.is_done(), "too short to be in flight"
if sys.argv[1] == "dropped":
    del backend
    gc.collect()
print("ends")
"""


@pytest.mark.parametrize("how", ["in flight", "dropped"])
def test_the_process_ends_with_a_call_in_flight(how: str) -> None:
    """The memory that it reads and writes is not taken away under it, and nobody waits for a thread for ever."""
    command = [sys.executable, "-c", _ENDS, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
