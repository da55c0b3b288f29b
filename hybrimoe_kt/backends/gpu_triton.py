"""GPU experts on this package's Triton kernels, straight from their slots.

Triton is optional: this module imports without it, and `unusable` then says so. On the CPU the kernels run only in
Triton's interpreter (TRITON_INTERPRET=1 before Python starts), slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hybrimoe_kt.device.backend import GpuBackend, KernelRow, Routed
from hybrimoe_kt.device.experts import ROLES, LayerExperts, bias_of
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.device.step_graph import opaque
from hybrimoe_kt.errors import KernelError, summary
from hybrimoe_kt.kernels.between import Between
from hybrimoe_kt.kernels.configs import decode_config, prefill_configs
from hybrimoe_kt.kernels.failures import launch_failures
from hybrimoe_kt.kernels.tables import code_words
from hybrimoe_kt.kernels.targets import INTERPRETER, Target, of_capability
from hybrimoe_kt.kernels.workspace import (
    CHUNK_TOKENS,
    DECODE_TOKENS,
    LayerShape,
    Workspace,
    decode_parts,
    prefill_parts,
)
from hybrimoe_kt.quants import TYPES, QuantType, kernel_types

if TYPE_CHECKING:
    from hybrimoe_kt.kernels.layer import LayerKernels

__all__ = ["TritonGpu", "target_of"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_WIDTH_STEP = 8
_MAX_SLOT_BYTES = 1 << 31
_DOT_NAMES = ("plain int8", "int8 dp4a", "int8 v_dot4", "int8 v_dot4")


class TritonGpu(GpuBackend):
    """Adds weighted sums; up to 8 tokens on matrix-vector kernels with int8 activations, more on tensor cores.

    A launch decides nothing from tensor values, so it can be captured in a CUDA graph. Calls must be on one stream.
    """

    name = "triton"
    answers_pairs = False
    finds_routed = True
    decides_on_device = True

    def __init__(self, target: Target | None = None) -> None:
        """`target` overrides what the slots' device says."""
        self._target = target
        self._layers: dict[int, LayerKernels] = {}
        self._space: Workspace | None = None
        self._max_tokens = 0
        self._whole: dict[int, Sequence[tuple[int, int]]] = {}
        """Layer -> slots of all its experts, as checked last."""

    @classmethod
    def unusable(cls, device: torch.device) -> str | None:
        """Return why the Triton kernels cannot run on `device`, None when they can."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "on the CPU Triton only runs in its interpreter (set TRITON_INTERPRET=1 before starting)"
        if device.type not in ("cpu", "cuda"):
            return f"no kernel was built for {device.type} devices"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch finds no such device"
        if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            return f"the GPU's compute capability is {major}.{minor}, the kernels want 8.0 or newer"
        return None

    @classmethod
    def types(cls) -> tuple[QuantType, ...]:
        return kernel_types()

    @classmethod
    def refuses(cls, experts: LayerExperts) -> str | None:
        """Return why the kernels do not read a layer's experts, None when they do."""
        for role, matrix in experts.named.items():
            kind = TYPES[matrix.ggml_type]
            if kind.unit is None:
                return f"{role} experts are {matrix.type_name}, which no GPU kernel reads"
            if matrix.columns % kind.column_step or matrix.rows % _WIDTH_STEP:
                wanted = f"multiples of {kind.column_step} columns and {_WIDTH_STEP} rows"
                return (
                    f"{role} experts are {matrix.rows}x{matrix.columns} {matrix.type_name}; GPU kernels want {wanted}"
                )
        if SlotLayout(experts).slot_bytes >= _MAX_SLOT_BYTES:
            return f"an expert takes {experts.expert_bytes} bytes; GPU kernels address up to {_MAX_SLOT_BYTES}"
        return None

    @classmethod
    def kernels(cls, experts: LayerExperts, capability: tuple[int, int] | str) -> list[KernelRow]:
        """Say which kernel serves gate, up and down experts on a GPU: (8, 6) for CUDA, "gfx1100" for HIP."""
        reason = cls.refuses(experts)
        if reason:
            place = f"on the CPU: {reason}"
            return [KernelRow(role, matrix.type_name, place, place) for role, matrix in experts.named.items()]
        target = _target_named(capability)
        dot = _DOT_NAMES[decode_config(target).form]
        pairs = " or ".join(str(config.pairs) for config in prefill_configs(target))
        rows = []
        for role, matrix in experts.named.items():
            op = "down" if role == "down" else "gate_up"
            inner = "float activations" if TYPES[matrix.ggml_type].is_float else dot
            large = f"prefill_{op} ({target.name}, blocks of {pairs} tokens)"
            rows.append(KernelRow(role, matrix.type_name, f"decode_{op} ({target.name}, {inner})", large))
        return rows

    @classmethod
    def planned_bytes(cls, experts: LayerExperts, max_tokens: int, capability: tuple[int, int] | str) -> int:
        return _bytes_for(_shape_of(experts), _target_named(capability), max_tokens)

    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        """Take note of a layer; KernelError for experts that `refuses` names, or a device without Triton."""
        reason = self.refuses(experts) or self.unusable(memory.device)
        if reason:
            raise KernelError(f"layer {experts.layer}: {reason}")
        if memory.dtype != torch.uint8 or memory.dim() != 2 or memory.shape[1] != layout.slot_bytes:
            raise KernelError(
                f"slots of layer {experts.layer} are {memory.dtype} {list(memory.shape)}, "
                f"wanted uint8 [num_slots, {layout.slot_bytes}]"
            )
        if not memory.is_contiguous() or memory.data_ptr() % 16:
            raise KernelError(f"slots of layer {experts.layer} must be contiguous from a multiple of 16 bytes")
        from hybrimoe_kt.kernels.layer import LayerKernels

        shape = _shape_of(experts)
        self._whole.pop(experts.layer, None)
        target, tables = self._target_of(memory.device), code_words(memory.device)
        gate, up, down = (layout.named.get(role) for role in ROLES)
        assert up is not None and down is not None, "every expert has them"
        between = _between(experts, layout)
        self._layers[experts.layer] = LayerKernels(target, shape, memory, tables, gate, up, down, between)
        if self._max_tokens:
            self._make_room()

    def _target_of(self, device: torch.device) -> Target:
        return self._target or target_of(device)

    def prepare(self, max_tokens: int) -> None:
        """Allocate the workspace, `workspace_bytes(max_tokens)`; it grows only for a larger layer added later."""
        self._max_tokens = max_tokens
        self._make_room()

    def _make_room(self) -> None:
        needed = self.workspace_bytes(self._max_tokens)
        if needed and (self._space is None or self._space.memory.numel() < needed):
            device = next(iter(self._layers.values())).memory.device
            self._space = Workspace(needed, device)

    def workspace_bytes(self, max_tokens: int) -> int:
        """Bytes of device memory `prepare` takes, for the layers added so far."""
        layers = self._layers.values()
        return max((_bytes_for(layer.shape, layer.target, max_tokens) for layer in layers), default=0)

    def launch(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        """Enqueue the experts of `slots` on the current stream; see `GpuBackend.launch`."""
        self._launch(layer, slots, slot_of, routed, out, clears=False)

    def launch_first(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        """The last kernel writes where it would add; see `GpuBackend.launch_first`."""
        self._launch(layer, slots, slot_of, routed, out, clears=True)

    def launch_planned(
        self, layer: int, slot_of: torch.Tensor, routed: Routed, out: torch.Tensor, *, is_first: bool
    ) -> None:
        """One token's launch reads from its table all that it does; see `GpuBackend.launch_planned`."""
        assert self._space is not None and len(routed.hidden) == 1, "one token, after prepare"
        kernels = self._layers[layer]
        self._check(layer, kernels, (), slot_of, routed, out)
        try:
            with _current(kernels.memory.device):
                opaque(functools.partial(kernels.add, self._space, 1, slot_of, *routed[:3], out, clears=is_first))
        except launch_failures() as error:
            raise KernelError(f"Triton cannot run the kernels of layer {layer}: {summary(error)}") from error

    def _launch(
        self,
        layer: int,
        slots: Sequence[tuple[int, int]],
        slot_of: torch.Tensor,
        routed: Routed,
        out: torch.Tensor,
        *,
        clears: bool,
    ) -> None:
        kernels = self._layers[layer]
        self._check(layer, kernels, slots, slot_of, routed, out)
        if not slots:
            if clears:
                out.zero_()
            return
        assert self._space is not None, "launch before prepare"
        try:
            with _current(kernels.memory.device):
                if routed.hidden.shape[0] <= CHUNK_TOKENS:
                    given = self._space, len(slots), slot_of, *routed[:3], out
                    opaque(functools.partial(kernels.add, *given, clears=clears))
                    return
                for part, rows in zip(routed.split(CHUNK_TOKENS), out.split(CHUNK_TOKENS), strict=True):
                    kernels.add(self._space, len(slots), slot_of, *part[:3], rows, clears=clears)
        except launch_failures() as error:
            raise KernelError(f"Triton cannot run the kernels of layer {layer}: {summary(error)}") from error

    def _check(
        self,
        layer: int,
        kernels: LayerKernels,
        slots: Sequence[tuple[int, int]],
        slot_of: torch.Tensor,
        routed: Routed,
        out: torch.Tensor,
    ) -> None:
        hidden, ids, weights = routed[:3]
        num_slots, shape = kernels.memory.shape[0], kernels.shape
        is_known = self._whole.get(layer) is slots  # the same object as before: all of a layer's, step after step
        for expert, slot in () if is_known else slots:
            if not 0 <= slot < num_slots:
                raise KernelError(f"expert {expert} of layer {layer} is said to be in slot {slot} of {num_slots}")
            if not 0 <= expert < shape.num_experts:
                raise KernelError(f"expert {expert} launched in layer {layer}, which has {shape.num_experts}")
        if len(slots) == shape.num_experts:
            self._whole[layer] = slots
        num_tokens = hidden.shape[0]
        if num_tokens > self._max_tokens:
            raise KernelError(f"{num_tokens} tokens in one call, prepared for up to {self._max_tokens}")
        routing = (num_tokens, ids.shape[-1])
        if ids.shape[-1] > shape.top_k:
            raise KernelError(f"{ids.shape[-1]} experts a token in layer {layer}, prepared for {shape.top_k}")
        for name, tensor, sizes, dtypes in (
            ("hidden", hidden, (num_tokens, shape.hidden), _FLOATS),
            ("ids", ids, routing, (torch.int64,)),
            ("weights", weights, routing, (torch.float32,)),
            ("out", out, (num_tokens, shape.hidden), (torch.float32,)),
            ("slot_of", slot_of[: shape.num_experts], (shape.num_experts,), (torch.int32,)),
        ):
            if tuple(tensor.shape) != sizes or tensor.dtype not in dtypes or not tensor.is_contiguous():
                raise KernelError(
                    f"{name} of layer {layer} is {tensor.dtype} {list(tensor.shape)}, "
                    f"wanted contiguous {' or '.join(map(str, dtypes))} {list(sizes)}"
                )
        if hidden.data_ptr() % 16 or out.data_ptr() % 16:
            raise KernelError(f"hidden and out of layer {layer} must begin at a multiple of 16 bytes")


def _between(experts: LayerExperts, layout: SlotLayout) -> Between:
    gate, up, down = (layout.named.get(bias_of(role)) for role in ROLES)
    if up is None or down is None:
        return Between(experts.form)
    first = 0 if gate is None else gate.offsets[0]
    return Between(experts.form, biases=(first, up.offsets[0]), down_bias=down.offsets[0])


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def target_of(device: torch.device) -> Target:
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip:
        return _target_named(torch.cuda.get_device_properties(device).gcnArchName)
    return _target_named(torch.cuda.get_device_capability(device))


def _target_named(capability: tuple[int, int] | str) -> Target:
    if isinstance(capability, str):
        return of_capability("hip", capability)
    return of_capability("cuda", 10 * capability[0] + capability[1])


def _shape_of(experts: LayerExperts) -> LayerShape:
    return LayerShape(experts.num_experts, experts.top_k, experts.hidden, experts.inter)


def _bytes_for(shape: LayerShape, target: Target, max_tokens: int) -> int:
    sizes: list[int] = [Workspace.bytes_for(decode_parts(shape, min(max_tokens, DECODE_TOKENS)))]
    if max_tokens > DECODE_TOKENS:
        for config in prefill_configs(target):
            parts = prefill_parts(shape, min(max_tokens, CHUNK_TOKENS), config.pairs, torch.float16)
            sizes.append(Workspace.bytes_for(parts))
    return max(sizes)
