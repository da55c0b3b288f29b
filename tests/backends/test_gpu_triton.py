"""The Triton backend as the executor calls it: every format and mixture, odd token counts, what it refuses."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

from hybrimoe_kt.backends import gpu_triton
from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.backends.gpu_torch import TorchGpu
from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.backends.registry import default_gpu
from hybrimoe_kt.device.backend import GpuBackend, Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.kernels import workspace
from hybrimoe_kt.kernels.targets import TARGETS
from tests.kernels.layers import DEVICE, KINDS, SlottedLayer, experts_of, relative_error, routed, slotted_layer
from tests.support.expert_layers import layer as expert_layer
from tests.support.random_blocks import Type

pytestmark = pytest.mark.kernels

INTERPRETED = pytest.mark.slow_interpreted
FLOATS = (Type.F16, Type.BF16)
QUICK = (Type.F16, Type.Q4_K, Type.Q6_K, Type.IQ2_XS)
"""Of each kind one: `tests/kernels/test_ops.py` has every type, in decode and in prefill."""
INT8_ERROR, HALF_ERROR = 2e-2, 1e-3
# gate, up, down: what Q4_K_M files mix, the widths that are no multiple of 256, and no two types alike.
MIXTURES = [
    (Type.Q4_K, Type.Q4_K, Type.Q6_K),
    (Type.Q4_K, Type.Q4_K, Type.Q5_0),
    (Type.Q5_K, Type.Q5_K, Type.Q8_0),
    (Type.Q4_K, Type.Q6_K, Type.F16),
    (Type.F16, Type.Q8_0, Type.Q4_0),
    (Type.BF16, Type.F16, Type.Q5_K),
    (Type.Q4_0, Type.BF16, Type.BF16),
    (Type.IQ3_XXS, Type.IQ2_S, Type.IQ3_S),
    (Type.Q6_K, Type.IQ2_XS, Type.IQ2_XXS),
    (Type.Q2_K, Type.Q3_K, Type.IQ4_NL),
    (Type.MXFP4, Type.Q8_0, Type.Q5_1),
    (Type.IQ4_XS, Type.Q2_K, Type.Q4_1),
]


def names(mixture: tuple[Type, ...]) -> str:
    return "-".join(kind.name for kind in mixture)


def backend_for(layer: SlottedLayer, max_tokens: int = 32, poison: int = 0xFF) -> TritonGpu:
    """Prepare a backend whose workspace holds NaN (0xFF: -1 as an int) or other rubbish (0x7F)."""
    backend = TritonGpu()
    assert backend.refuses(layer.experts) is None
    backend.add_layer(layer.experts, layer.layout, layer.memory)
    backend.prepare(max_tokens)
    assert backend._space is not None
    backend._space.memory.fill_(poison)
    return backend


def launched(
    layer: SlottedLayer, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], backend: TritonGpu | None = None
) -> torch.Tensor:
    out = torch.zeros(inputs[0].shape[0], layer.experts.hidden, device=DEVICE)
    (backend or backend_for(layer)).launch(layer.experts.layer, layer.slots, layer.slot_of, Routed(*inputs), out)
    return out


@pytest.mark.parametrize(
    ("kind", "num_tokens"),
    [
        *((kind, 1) for kind in KINDS),
        *((kind, num) for kind in QUICK for num in (2, 17)),
        *((Type.Q4_K, num) for num in (3, 7)),
        *(pytest.param(kind, num, marks=INTERPRETED) for kind in KINDS if kind not in QUICK for num in (2, 17)),
    ],
    ids=lambda value: value.name if isinstance(value, Type) else str(value),
)
def test_every_format_and_odd_token_counts(kind: Type, num_tokens: int) -> None:
    """The dtype alternates with the token count; poison too."""
    layer = slotted_layer(kind)
    half = num_tokens in (2, 17)
    inputs = routed(layer, num_tokens, torch.float16 if half else torch.float32, seed=num_tokens)
    found = launched(layer, inputs, backend_for(layer, poison=0x7F if half else 0xFF))
    exact = kind in FLOATS or num_tokens > workspace.DECODE_TOKENS
    assert relative_error(found, layer.answer(*inputs)) < (HALF_ERROR if exact else INT8_ERROR)


@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize("has_slots", [True, False])
def test_what_is_launched_first_finds_anything(num_tokens: int, has_slots: bool) -> None:
    layer = slotted_layer(Type.Q4_K)
    inputs, backend = routed(layer, num_tokens), backend_for(layer)
    out = torch.full((num_tokens, layer.experts.hidden), float("nan"), device=DEVICE)
    slots = layer.slots if has_slots else []
    backend.launch_first(layer.experts.layer, slots, layer.slot_of, Routed(*inputs), out)
    assert torch.equal(out, launched(layer, inputs, backend) if has_slots else torch.zeros_like(out))


@pytest.mark.parametrize(
    ("mixture", "num_tokens"),
    [
        pytest.param(mixture, num, marks=() if place % 2 == (num == 17) else INTERPRETED, id=f"{names(mixture)}-{num}")
        for place, mixture in enumerate(MIXTURES)
        for num in (3, 17)
    ],
)
def test_mixtures(mixture: tuple[Type, Type, Type], num_tokens: int) -> None:
    layer = slotted_layer(*mixture)
    inputs = routed(layer, num_tokens)
    found = launched(layer, inputs)
    exact = num_tokens > workspace.DECODE_TOKENS or all(kind in FLOATS for kind in mixture)
    assert relative_error(found, layer.answer(*inputs)) < (HALF_ERROR if exact else INT8_ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [2, 17])
@pytest.mark.parametrize("away", [1, 4, 7])
@pytest.mark.parametrize("gate", KINDS, ids=lambda kind: kind.name)
def test_every_gate_with_three_others_as_up(gate: Type, away: int, num_tokens: int) -> None:
    """Down is a program of its own, so one type each suffices; they go round."""
    place = KINDS.index(gate)
    up, down = KINDS[(place + away) % len(KINDS)], KINDS[(place - away) % len(KINDS)]
    layer = slotted_layer(gate, up, down)
    inputs = routed(layer, num_tokens)
    exact = num_tokens > workspace.DECODE_TOKENS or all(kind in FLOATS for kind in (gate, up, down))
    error = relative_error(launched(layer, inputs), layer.answer(*inputs))
    assert error < (HALF_ERROR if exact else INT8_ERROR)


@pytest.mark.parametrize("num_tokens", [2, 17])
def test_bfloat16_activations_on_decode_and_prefill(num_tokens: int) -> None:
    for kind in (Type.Q4_K, Type.BF16):
        layer = slotted_layer(kind)
        inputs = routed(layer, num_tokens, torch.bfloat16)
        assert relative_error(launched(layer, inputs), layer.answer(*inputs)) < INT8_ERROR


@pytest.mark.parametrize("num_tokens", [3, 17])
def test_groups_add_up(num_tokens: int) -> None:
    """Residents first, late arrivals after: `out` keeps what it held, pairs of other experts are left alone."""
    layer = slotted_layer(Type.Q4_K)
    backend, inputs = backend_for(layer), routed(layer, num_tokens)
    before = torch.randn(num_tokens, layer.experts.hidden, device=DEVICE)
    out = before.clone()
    for group in (layer.slots[:1], layer.slots[1:]):
        slot_of = torch.full_like(layer.slot_of, -1)
        for expert, slot in group:
            slot_of[expert] = slot
        backend.launch(0, group, slot_of, Routed(*inputs), out)
    torch.testing.assert_close(out - before, launched(layer, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [3, 17])
def test_the_same_call_gives_the_same_bits(num_tokens: int) -> None:
    layer = slotted_layer(Type.Q8_0)
    inputs = routed(layer, num_tokens)
    first = launched(layer, inputs, backend_for(layer, poison=0))
    assert torch.equal(first, launched(layer, inputs, backend_for(layer, poison=0x7F)))


def test_where_experts_lie_changes_no_bit() -> None:
    layer, moved = slotted_layer(Type.Q5_K), slotted_layer(Type.Q5_K)
    moved.memory = layer.memory.roll(1, dims=0)
    moved.slot_of = torch.where(layer.slot_of >= 0, (layer.slot_of + 1) % layer.memory.shape[0], -1).to(torch.int32)
    inputs = routed(layer, 3)
    assert torch.equal(launched(layer, inputs), launched(moved, inputs))


def test_no_expert_in_a_slot_adds_nothing() -> None:
    layer = slotted_layer(Type.Q8_0)
    out = torch.ones(3, layer.experts.hidden, device=DEVICE)
    backend_for(layer).launch(0, [], torch.full_like(layer.slot_of, -1), Routed(*routed(layer, 3)), out)
    assert torch.equal(out, torch.ones_like(out))


def test_long_prompts_pass_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = slotted_layer(Type.Q4_0)
    inputs = routed(layer, 37)
    whole = launched(layer, inputs, backend_for(layer, 64))
    monkeypatch.setattr(gpu_triton, "CHUNK_TOKENS", 16)  # 16, 16 and 5: the last on the decode kernels
    small = backend_for(layer, 64)
    assert small.workspace_bytes(64) == small.workspace_bytes(16)
    found = launched(layer, inputs, small)
    torch.testing.assert_close(found[:32], whole[:32], rtol=1e-5, atol=1e-5)
    assert relative_error(found, whole) < INT8_ERROR


def test_the_workspace_is_allocated_once_and_launches_allocate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are replaced, as the interpreter copies their arguments; what torch is asked for is recorded."""
    layer = slotted_layer(Type.Q4_K)
    backend = backend_for(layer)
    assert backend._space is not None
    assert backend._space.memory.numel() == backend.workspace_bytes(32)
    module = sys.modules["hybrimoe_kt.kernels.layer"]
    calls: list[str] = []
    ops = ("quantize_rows", "decode_gate_up", "decode_down", "sort_pairs", "prefill_gate_up", "prefill_down")
    for name in (*ops, "combine_pairs"):
        monkeypatch.setattr(module, name, lambda *_, name=name, **given: calls.append(name))
    asked: set[str] = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            asked.add(func.__name__)
            return func(*args, **(kwargs or {}))

    for num_tokens in (3, 17):
        inputs = routed(layer, num_tokens)
        out = torch.zeros(num_tokens, layer.experts.hidden, device=DEVICE)
        with Recorder():
            backend.launch(0, layer.slots, layer.slot_of, Routed(*inputs), out)
    assert {name.partition(".")[0] for name in asked} <= {"view", "slice", "copy_", "detach", "alias"}
    decode = ["quantize_rows", "decode_gate_up", "quantize_rows", "decode_down"]
    assert calls == [*decode, "sort_pairs", "prefill_gate_up", "prefill_down", "combine_pairs"]


def test_a_layer_that_gets_slots_later_finds_room() -> None:
    small, large = slotted_layer(Type.F16), slotted_layer(Type.Q4_K, number=1)
    backend = backend_for(small)
    backend.add_layer(small.experts, small.layout, small.memory.clone())
    kept = backend._space
    assert kept is not None
    backend.add_layer(large.experts, large.layout, large.memory)
    assert backend._space is not None and backend._space.memory.numel() == backend.workspace_bytes(32)
    assert backend._space is not kept
    for layer in (small, large):
        inputs = routed(layer, 9)
        assert relative_error(launched(layer, inputs, backend), layer.answer(*inputs)) < HALF_ERROR


def test_a_slot_table_for_the_largest_layer_serves_all() -> None:
    layer = slotted_layer(Type.Q8_0)
    longer = torch.cat((layer.slot_of, torch.full((3,), -1, dtype=torch.int32, device=DEVICE)))
    for num_tokens in (3, 17):
        inputs = routed(layer, num_tokens)
        out = torch.zeros(num_tokens, layer.experts.hidden, device=DEVICE)
        backend_for(layer).launch(0, layer.slots, longer, Routed(*inputs), out)
        assert torch.equal(out, launched(layer, inputs))


def test_a_slot_or_expert_out_of_range_is_caught_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = slotted_layer(Type.Q8_0)
    backend, inputs = backend_for(layer), routed(layer, 1)
    out = torch.zeros(1, layer.experts.hidden, device=DEVICE)
    monkeypatch.setattr(type(backend._layers[0]), "add", lambda *_, **given: pytest.fail("launched"))
    for slots, message in (
        ([(0, 5)], "expert 0 of layer 0 is said to be in slot 5 of 5"),
        ([(0, 1), (2, -1)], "slot -1 of 5"),
        ([(5, 0)], "expert 5 launched in layer 0, which has 5"),
    ):
        with pytest.raises(KernelError, match=message):
            backend.launch(0, slots, layer.slot_of, Routed(*inputs), out)


def test_ids_out_of_range_read_nothing() -> None:
    """Ids are device data that no host can check without waiting: unknown ones count as not in this launch."""
    layer = slotted_layer(Type.Q4_0)
    for num_tokens in (3, 17):
        hidden, ids, weights = routed(layer, num_tokens)
        wild = ids.clone()
        wild[0, 0], wild[1, 1] = 10**9, -7
        ids[0, 0], ids[1, 1] = -1, -1
        assert torch.equal(launched(layer, (hidden, wild, weights)), launched(layer, (hidden, ids, weights)))


def test_inputs_it_would_get_wrong_are_refused() -> None:
    layer = slotted_layer(Type.Q8_0)
    backend = backend_for(layer, max_tokens=4)
    hidden, ids, weights = routed(layer, 3)
    out = torch.zeros(3, layer.experts.hidden, device=DEVICE)
    shifted = torch.zeros(hidden.numel() + 1, device=DEVICE)[1:].view(hidden.shape)
    wrong = [
        ("hidden", (hidden.double(), ids, weights, out)),
        ("hidden", (hidden[:, ::2], ids, weights, out)),
        ("a multiple of 16 bytes", (shifted, ids, weights, out)),
        ("ids", (hidden, ids.int(), weights, out)),
        ("weights", (hidden, ids, weights[:, :1], out)),
        ("out", (hidden, ids, weights, out.half())),
        ("out", (hidden, ids, weights, out.t().contiguous().t())),
        ("prepared for up to 4", (hidden.repeat(2, 1), ids.repeat(2, 1), weights.repeat(2, 1), out.repeat(2, 1))),
        ("prepared for 2", (hidden, ids.repeat(1, 2), weights.repeat(1, 2), out)),
    ]
    for message, (x, i, w, o) in wrong:
        with pytest.raises(KernelError, match=message):
            backend.launch(0, layer.slots, layer.slot_of, Routed(x, i, w), o)
    with pytest.raises(KernelError, match="slot_of"):
        backend.launch(0, layer.slots, layer.slot_of.long(), Routed(hidden, ids, weights), out)
    with pytest.raises(KernelError, match=r"wanted uint8 \[num_slots, "):
        TritonGpu().add_layer(layer.experts, layer.layout, layer.memory[:, :-128])


def with_down(layer: SlottedLayer, kind: Type, num_bytes: int) -> LayerExperts:
    """The layer's experts with another type's down matrices; only type and shape are looked at."""
    experts = layer.experts
    data = torch.zeros(experts.num_experts, num_bytes, dtype=torch.uint8)
    return replace(experts, down=ExpertMatrix(data, int(kind), experts.hidden, experts.inter))


def test_types_without_a_kernel_are_left_to_the_cpu() -> None:
    layer = slotted_layer(Type.Q4_K)
    for kind, block, block_bytes in ((Type.IQ1_S, 256, 50), (Type.TQ2_0, 256, 66), (Type.Q1_0, 128, 18)):
        experts = with_down(layer, kind, 256 * 256 // block * block_bytes)
        reason = f"down experts are {kind.name}, which no GPU kernel reads"
        assert TritonGpu.refuses(experts) == reason
        with pytest.raises(KernelError, match=reason):
            TritonGpu().add_layer(experts, layer.layout, layer.memory)
        rows = TritonGpu.kernels(experts, (8, 6))
        assert all(row.decode == row.prefill == f"on the CPU: {reason}" for row in rows)


def test_shapes_without_a_kernel_are_refused() -> None:
    hidden, inter = 12, 16
    data = torch.zeros(2, hidden * inter * 2, dtype=torch.uint8)
    gate, down = (ExpertMatrix(data, int(Type.F16), *shape) for shape in ((inter, hidden), (hidden, inter)))
    experts = LayerExperts(0, 2, 1, hidden, inter, gate, gate, down)
    assert (
        TritonGpu.refuses(experts) == "gate experts are 16x12 F16; GPU kernels want multiples of 8 columns and 8 rows"
    )


def test_doctor_sees_which_kernel_serves_which_tensor() -> None:
    experts = slotted_layer(Type.Q4_K, Type.Q4_K, Type.F16).experts
    gate, up, down = TritonGpu.kernels(experts, (8, 6))
    assert (gate.tensor, gate.type_name, gate.decode) == ("gate", "Q4_K", "decode_gate_up (sm_86, int8 dp4a)")
    assert up.prefill == "prefill_gate_up (sm_86, blocks of 32 tokens)"
    assert (down.tensor, down.decode) == ("down", "decode_down (sm_86, float activations)")
    assert TritonGpu.kernels(experts, (9, 0))[0].prefill == "prefill_gate_up (sm_90, blocks of 32 or 64 tokens)"
    assert TritonGpu.kernels(experts, "gfx1101")[0].decode == "decode_gate_up (gfx1100, int8 v_dot4)"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_torch_fallback_is_exact(kind: Type) -> None:
    layer = slotted_layer(kind)
    inputs = routed(layer, 3)
    backend: GpuBackend = TorchGpu()
    backend.add_layer(layer.experts, layer.layout, layer.memory)
    backend.prepare(3)
    out = torch.ones(3, layer.experts.hidden, device=DEVICE)
    backend.launch(0, layer.slots, layer.slot_of, Routed(*inputs), out)
    assert relative_error(out - 1, layer.answer(*inputs)) < 1e-5
    with pytest.raises(KernelError, match="slot 5 of 5"):
        backend.launch(0, [(0, 5)], layer.slot_of, Routed(*inputs), out)


def test_q5_0_is_dequantised_where_it_lies_as_gguf_does() -> None:
    """Of the types here only Q5_0 is ours; on a GPU it would otherwise pass through the CPU."""
    layer = slotted_layer(Type.Q5_0)
    gate = layer.experts.gate
    ours = dequantize(gate.data[3].to(DEVICE), gate.ggml_type, (gate.rows, gate.columns))
    assert ours.device.type == DEVICE.type
    assert torch.equal(ours.cpu(), layer.matrices(3)[0])


def test_without_triton_torch_takes_over_with_one_warning() -> None:
    """In a fresh interpreter that finds no Triton: kernels import, the fallback is chosen, one line says so."""
    code = """
import importlib.util, logging, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
logging.basicConfig(level=logging.WARNING)
import torch, hybrimoe_kt.kernels
from hybrimoe_kt.backends.registry import default_gpu
print(default_gpu(torch.device("cpu")).name, default_gpu(torch.device("cpu")).name)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["torch", "torch"]
    assert done.stderr.count("dequantised and multiplied by torch") == 1
    assert "Triton is not installed" in done.stderr


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonGpu.unusable(torch.device("cpu")) is None
    assert default_gpu(torch.device("cpu")).name == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with caplog.at_level(logging.WARNING):
        assert default_gpu(torch.device("cpu")).name == "torch"
    assert "TRITON_INTERPRET=1" in caplog.text
    assert TritonGpu.unusable(torch.device("xpu")) == "no kernel was built for xpu devices"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TritonGpu.unusable(torch.device("cuda")) == "torch finds no such device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert (
        TritonGpu.unusable(torch.device("cuda")) == "the GPU's compute capability is 7.5, the kernels want 8.0 or newer"
    )


@pytest.mark.slow
def test_a_layer_of_the_embedded_model(embedded_model: Path) -> None:
    """A trained layer: 32 experts of 256x256 in Q4_K, all in slots, its routing imitated; decode and prefill."""
    experts = experts_of(embedded_model, layer=0)
    layout = SlotLayout(experts)
    memory = torch.zeros(experts.num_experts, layout.slot_bytes, dtype=torch.uint8)
    for number in range(experts.num_experts):
        layout.write(experts.parts(number), memory[number])
    slot_of = torch.arange(experts.num_experts, dtype=torch.int32)
    layer = SlottedLayer(experts, layout, memory.to(DEVICE), slot_of.to(DEVICE))
    for num_tokens, limit in ((1, INT8_ERROR), (8, INT8_ERROR), (40, HALF_ERROR)):
        inputs = routed(layer, num_tokens)
        assert relative_error(launched(layer, inputs, backend_for(layer, 64)), layer.answer(*inputs)) < limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_a_launch_can_be_captured_in_a_graph(num_tokens: int) -> None:
    layer = slotted_layer(Type.Q4_K)
    backend, inputs = backend_for(layer), routed(layer, num_tokens)
    wanted = launched(layer, inputs, backend)  # also compiles
    out = torch.zeros_like(wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.launch(0, layer.slots, layer.slot_of, Routed(*inputs), out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 512, 5000])
def test_the_workspace_is_what_was_planned(num_tokens: int) -> None:
    experts = expert_layer(Type.Q4_K)
    layout, gpu = SlotLayout(experts), TritonGpu(TARGETS["sm_80"])
    gpu.add_layer(experts, layout, torch.empty(2, layout.slot_bytes, dtype=torch.uint8))
    assert gpu.workspace_bytes(num_tokens) == TritonGpu.planned_bytes(experts, num_tokens, (8, 0)) > 0
