"""The gates of the layers ahead, asked together: one product and one choice for all of them.

Asked one by one, three gates are some thirty small kernels or host calls. Their weights therefore lie in one tensor
`[num_layers, num_experts, hidden]`, of which each gate's own parameter is a view, and consecutive gates are one
batched product. That needs gates of one shape that choose by the largest score; whether they do is found out by
asking them. Others, such as those that choose among groups of experts first, are asked one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.backends.row_kernels import Ranking, choose_into, gates_of, is_used, takes_gates, takes_ranking

__all__ = ["Gate", "GateRow", "logits_and_ids"]

_TRIED = 64
"""Random states by which a gate's way of choosing is found out."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A MoE layer's gate, the factor of the norm in front of it `[hidden]`, and the gate's further arguments."""

    module: nn.Module
    norm: torch.Tensor | None
    inputs: tuple[Any, ...]
    takes_texts: bool = False
    """Whether it is asked with states `[batch, tokens, hidden]`."""
    normalises: bool = False
    """Whether it takes states as they are and normalises them itself; `norm` is then of the experts alone."""
    gives_probabilities: bool = False
    """Whether it returns the softmax of its logits in their place."""

    @property
    def weight(self) -> torch.Tensor:
        """What hidden states are multiplied by, `[num_experts, hidden]`."""
        weight = getattr(self.module, "weight", None)  # or within a linear layer of its own
        own = [weight] if isinstance(weight, torch.Tensor) else self.module.parameters()
        found = next((value for value in own if value.dim() == 2), None)
        assert found is not None, "routers have a weight"
        return found

    def on(self, device: torch.device) -> Gate:
        """The gate itself, or a copy on `device` where its layer stands on another."""
        if self.weight.device == device:
            return self
        norm = None if self.norm is None else self.norm.to(device)
        inputs = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in self.inputs)
        return replace(self, module=copy.deepcopy(self.module).to(device), norm=norm, inputs=inputs)

    def ask(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[num_tokens, num_experts]` and ids `[num_tokens, top_k]` for `hidden`, normalised for this gate."""
        # `forward`, not a call: the hook that notes scores must not take a prediction for the real thing
        answer = self.module.forward(hidden[None] if self.takes_texts else hidden, *self.inputs)
        logits, ids = logits_and_ids(answer)
        return self.logits_of(logits), ids

    def logits_of(self, returned: torch.Tensor) -> torch.Tensor:
        """What it returned as logits; of probabilities their logarithms, whose softmax they are."""
        return returned.log() if self.gives_probabilities else returned

    @property
    def bias(self) -> torch.Tensor | None:
        """What is added to its scores before the choice, `[num_experts]`, where it has such a thing."""
        owners = self.module, getattr(self.module, "moe_statics", None)  # ERNIE's
        own = [getattr(owner, "e_score_correction_bias", None) for owner in owners]
        given = [value for value in (*own, *self.inputs) if isinstance(value, torch.Tensor)]
        return given[0].detach().float().flatten() if given else None

    @property
    def logit_bias(self) -> torch.Tensor | None:
        """What its product adds to the logits, `[num_experts]`, where it has such a thing."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, torch.Tensor) else None


def logits_and_ids(output: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router returns beside the weights in the middle; Granite's had them in the other order up to 5.20."""
    first, _, last = output
    return (first, last) if first.is_floating_point() else (last, first)


class GateRow:
    """All gates of a model in order, on one device."""

    def __init__(self, gates: Sequence[Gate], device: torch.device) -> None:
        self._gates = [gate.on(device) for gate in gates]
        self._choices = [_choice_of(gate) for gate in self._gates]
        self._weights = _in_one(self._gates) if None not in self._choices else None

    def predictor(self, place: int, layers: Sequence[int], ahead: slice) -> _Together | _OneByOne:
        """What asks the gates of `layers[ahead]` for the hidden states entering layer `layers[place]`."""
        gates, numbers = self._gates[ahead], list(layers[ahead])
        ratios = [_ratio(self._gates[place].norm, gate) for gate in gates]
        choices = self._choices[ahead]
        if self._weights is None or len(set(choices)) > 1:
            return _OneByOne(numbers, gates, ratios)
        kernel = getattr(gates[0].module, "kernel", "torch")
        biases, added = [gate.bias for gate in gates], [gate.logit_bias for gate in gates]
        return _Together(numbers, self._weights[ahead], ratios, choices[0], biases, added, kernel)


class _OneByOne:
    """See `device.readback.Predict`."""

    def __init__(self, layers: list[int], gates: Sequence[Gate], ratios: Sequence[torch.Tensor | None]) -> None:
        self.layers: Sequence[int] = layers
        self._ahead = list(zip(gates, ratios, strict=True))
        self.num_experts = len(gates[0].weight)

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        logits = []
        for place, (gate, ratio) in enumerate(self._ahead):
            corrected = hidden.to(gate.weight.dtype)
            found, chosen = gate.ask(corrected if ratio is None else corrected * ratio)
            ids[place].copy_(chosen)
            logits.append(found)
        _write_scores(torch.stack(logits), scores)


class _Together:
    """See `device.readback.Predict`."""

    def __init__(
        self,
        layers: list[int],
        weights: torch.Tensor,
        ratios: Sequence[torch.Tensor | None],
        choice: _Choice | None,
        biases: Sequence[torch.Tensor | None],
        added: Sequence[torch.Tensor | None],
        kernel: str = "torch",
    ) -> None:
        """`weights [num_layers, num_experts, hidden]`; ratios `[hidden]` in their type; `kernel` as of FusedRouter.

        `biases` are of the choice, `added` to the logits.
        """
        assert choice is not None, "gates that choose otherwise are asked one by one"
        self.layers: Sequence[int] = layers
        self.num_experts = weights.shape[1]
        self._weights, self._transposed, self._choice = weights, weights.transpose(1, 2), choice
        known = [ratio for ratio in ratios if ratio is not None]
        ones = [torch.ones_like(known[0]) if ratio is None else ratio for ratio in ratios] if known else []
        self._ratios = torch.stack(ones)[:, None] if ones else None
        self._biases, self._added = _stacked(biases), _stacked(added)
        self._is_one_launch = is_used(kernel, weights.device) and takes_ranking(Ranking(1), self.num_experts)

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        if self._is_one_launch and len(hidden) == 1 and takes_gates(hidden, self._weights):
            factors = None if self._ratios is None else self._ratios[:, 0]
            logits = gates_of(hidden.detach(), self._weights, factors).transpose(0, 1)
            self._choose_at_once(logits if self._added is None else logits + self._added, ids, scores)
            return
        hidden = hidden.detach() if hidden.dtype == self._weights.dtype else hidden.detach().to(self._weights.dtype)
        corrected = hidden.expand(len(self.layers), -1, -1) if self._ratios is None else hidden * self._ratios
        logits = torch.bmm(corrected, self._transposed)  # [num_layers, num_tokens, num_experts]
        logits = logits if self._added is None else logits + self._added
        if self._is_one_launch:
            self._choose_at_once(logits, ids, scores)
            return
        _write_scores(logits, scores)
        ranked = self._choice(logits, self._biases)
        unwanted = torch.empty_like(ids, dtype=ranked.dtype)  # not kept: a capture goes on writing where it was
        torch.topk(ranked, ids.shape[2], dim=-1, out=(unwanted, ids))

    def _choose_at_once(self, logits: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """The same in one launch, for one token."""
        ranking = Ranking(ids.shape[2], is_sigmoid=self._choice is _by_biased_sigmoid)
        is_one = logits.shape[1] == 1
        probabilities = scores if is_one else torch.empty(logits.shape, device=logits.device)
        flat_logits, flat_ids, flat_probabilities = (
            tensor.view(-1, tensor.shape[-1]) for tensor in (logits, ids, probabilities)
        )
        biases = None if self._choice is _by_logit else self._biases
        choose_into(flat_logits, ranking, biases, None, flat_ids, flat_probabilities)
        if not is_one:
            torch.mean(probabilities, dim=1, out=scores)


def _stacked(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """`[num_layers, 1, num_experts]`, None where some gate has none."""
    present = [value for value in values if value is not None]
    return torch.stack(present)[:, None] if len(present) == len(values) else None


_Choice = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""From logits `[..., num_experts]` and biases to the scores whose largest are chosen."""


def _by_logit(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Softmax keeps the order of the logits."""
    return logits


def _by_biased_sigmoid(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert bias is not None, "chosen for gates that have one"
    return logits.float().sigmoid() + bias


def _by_biased_softmax(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert bias is not None, "chosen for gates that have one"
    return torch.softmax(logits.float(), dim=-1) + bias


@torch.no_grad()
def _choice_of(gate: Gate) -> _Choice | None:
    """How a gate chooses, found out on random states; None if in no way known here."""
    weight = gate.weight
    generator = torch.Generator().manual_seed(20250405)
    hidden = torch.randn(_TRIED, weight.shape[-1], generator=generator).to(weight)
    hidden /= nn.functional.linear(hidden, weight).float().std().clamp_min(1e-6)  # logits of ordinary size: no ties
    logits, ids = gate.ask(hidden)
    product = nn.functional.linear(hidden, weight, gate.logit_bias).float()
    if not torch.allclose(product, logits.float(), rtol=0.05, atol=0.05):
        return None
    bias = gate.bias
    for choice in (_by_biased_sigmoid, _by_biased_softmax, _by_logit) if bias is not None else (_by_logit,):
        ranked = choice(logits, bias)
        largest = ranked.topk(ids.shape[-1], dim=-1).values.sort(dim=-1).values
        if torch.equal(ranked.gather(-1, ids).sort(dim=-1).values, largest):  # whichever of equal ones it took
            return choice
    return None


def _in_one(gates: Sequence[Gate]) -> torch.Tensor | None:
    """Move the gates' weights into one tensor `[num_layers, num_experts, hidden]`; None where they differ in kind."""
    weights = [gate.weight for gate in gates]
    if len({(weight.shape, weight.dtype) for weight in weights}) > 1:
        return None
    together = torch.stack([weight.detach() for weight in weights])
    for weight, place in zip(weights, together, strict=True):
        weight.data = place
    return together


def _write_scores(logits: torch.Tensor, scores: torch.Tensor) -> None:
    """Write probabilities averaged over the tokens; `logits [num_layers, num_tokens, num_experts]`."""
    if logits.shape[1] == 1 and logits.dtype == torch.float32:
        torch.softmax(logits[:, 0], dim=-1, out=scores)
    else:
        scores.copy_(torch.softmax(logits.float(), dim=-1).mean(dim=1))


def _ratio(ours: torch.Tensor | None, gate: Gate) -> torch.Tensor | None:
    """What turns a state normalised by `ours` into one that `gate` takes, `[hidden]`."""
    if ours is None or gate.norm is None or bool((ours == 0).any()):
        return None
    theirs = torch.ones_like(ours) if gate.normalises else gate.norm
    return (theirs.float() / ours.float()).detach().to(gate.weight.dtype)
