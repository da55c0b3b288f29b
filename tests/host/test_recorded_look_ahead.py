"""A recording's look-ahead is what the later layers' gates say of the hidden states entering this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.host.hf.look_ahead import look_ahead
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.sim.record import Recorder
from tests.support.generated_model import GeneratedModel, Shape


@pytest.mark.parametrize("accelerator", ["none", "emulated"])
def test_recorded_predictions_are_the_gates_of_the_later_layers(
    generated: Callable[[Shape], GeneratedModel], accelerator: str
) -> None:
    model = generated(Shape(layers=4, experts=16, top_k=4))
    overrides = {"accelerator": accelerator, "cache_size": 4, "cpu_backend": "torch_reference", "prefetch_size": 0}
    engine = build_engine(model.path, progress=False, option_overrides=overrides)
    runtime = engine.runtime
    look_ahead(engine.model, runtime, engine.loaded.architecture, 3)
    runtime.recorder = recorder = Recorder(engine.model_name, runtime.layer_specs())
    entering: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(4)}

    def keep(module: HybriMoEExperts, given: Any) -> None:
        entering[module.layer].append(given[0].detach().clone())

    for module in engine.model.modules():
        if isinstance(module, HybriMoEExperts):
            module.register_forward_pre_hook(keep)
    for size in (5, 1):
        list(engine.feed(list(range(20, 30)), size))
    trace = recorder.trace()
    assert trace.depth == 3 and trace.predicted is not None and trace.predicted_scores is not None

    layers = engine.model.model.layers
    for position in range(3):
        hidden = torch.cat(entering[position])
        for ahead in range(3 - position):
            later = layers[position + 1 + ahead]
            norms = later.post_attention_layernorm.weight / layers[position].post_attention_layernorm.weight
            probabilities = torch.softmax((hidden * norms) @ later.mlp.gate.weight.T, dim=-1)
            expected = probabilities.topk(4, dim=-1).indices.sort(dim=-1).values
            found = torch.from_numpy(trace.predicted[:, position, ahead]).long().sort(dim=-1).values
            assert (expected == found).float().mean() > 0.99
            lone = [step.index for step in trace.steps if step.num_tokens == 1]
            scores = torch.from_numpy(trace.predicted_scores[lone, position, ahead])
            torch.testing.assert_close(scores, probabilities[10:], atol=1e-3, rtol=1e-2)
    assert (trace.predicted[:, 3] == -1).all(), "nothing follows the last layer"
