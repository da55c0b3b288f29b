"""The launches of one MoE layer's experts, in order; nothing here waits, allocates or looks at a tensor's values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .between import PLAIN, Between
from .combine_pairs import combine_pairs
from .configs import combine_config, decode_config, prefill_config, quantize_config, sort_config
from .decode_down import decode_down
from .decode_gate_up import decode_gate_up
from .prefill_down import prefill_down
from .prefill_gate_up import prefill_gate_up
from .quantize_rows import quantize_rows
from .sort_pairs import sort_pairs
from .targets import Target
from .workspace import DECODE_TOKENS, LayerShape, MatrixInSlot, Workspace, prefill_parts

__all__ = ["LayerKernels"]


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """One layer's matrices in its slots `memory`, uint8 `[num_slots, slot_bytes]`, and the GPU to launch for.

    `tables` is `code_words` of the slots' device.
    """

    target: Target
    shape: LayerShape
    memory: torch.Tensor
    tables: torch.Tensor
    gate: MatrixInSlot | None
    up: MatrixInSlot
    down: MatrixInSlot
    between: Between = PLAIN

    def add(
        self,
        space: Workspace,
        num_present: int,
        slot_of: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        *,
        clears: bool = False,
    ) -> None:
        """Add the weighted answers of experts with a slot to `out` float32 `[T, H]`, which is zeroed first if `clears`.

        `num_present` of them have one: it decides a launch shape, never the result. `slot_of` int32 `[num_experts]`,
        `hidden [T, H]` float, `ids` int64 and `weights` float32 `[T, K]`; all contiguous, on the slots' device.
        """
        if hidden.shape[0] <= DECODE_TOKENS:
            self._decode(space, slot_of, hidden, ids, weights, out, clears=clears)
        else:
            if clears:
                out.zero_()
            self._prefill(space, num_present, slot_of, hidden, ids, weights, out)

    def _decode(
        self,
        space: Workspace,
        slot_of: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        *,
        clears: bool,
    ) -> None:
        part = space.decode(self.shape, hidden.shape[0])
        config, quantize = decode_config(self.target), quantize_config(self.target)
        rows = part["xq"], part["xs"], part["xm"]
        if not all(matrix.type.is_float for matrix in (self.gate or self.up, self.up)):
            quantize_rows(hidden, *rows, quantize)
        act, pair_slot = part["act"], part["pair_slot"]
        slots, matrices = (self.memory, self.tables), (self.gate, self.up)
        decode_gate_up(*slots, *matrices, slot_of, ids, hidden, rows, act, pair_slot, config, self.between)
        rows = part["aq"], part["as"], part["am"]
        if not self.down.type.is_float:
            quantize_rows(act, *rows, quantize)
        given = pair_slot, weights, act, rows, out, config
        decode_down(*slots, self.down, *given, clears=clears, between=self.between)

    def _prefill(
        self,
        space: Workspace,
        num_present: int,
        slot_of: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        one_type = self.gate is None or self.gate.type is self.up.type
        config = prefill_config(self.target, ids.numel() / max(num_present, 1), one_type=one_type)
        dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float16
        part = space.carve(prefill_parts(self.shape, hidden.shape[0], config.pairs, dtype))
        pairs, slots, act, answers = part["pairs"], part["slots"], part["act"], part["answers"]
        x = hidden if hidden.dtype == dtype else part["x"].copy_(hidden)
        sort_pairs(ids, slot_of, pairs, slots, config.pairs, sort_config(self.target))
        matrices = self.memory, self.tables, self.gate, self.up
        prefill_gate_up(*matrices, pairs, slots, ids.shape[1], x, act, config, self.between)
        prefill_down(self.memory, self.tables, self.down, pairs, slots, act, answers, config, self.between)
        combine_pairs(answers, ids, weights, slot_of, out, combine_config(self.target))
