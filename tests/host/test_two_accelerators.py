"""Layers divided over two accelerators by a rule file: the same tokens, each with its own slots and link.

Experts and dense weights both: the hidden states cross once in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybrimoe_kt.device.emulated.adversarial import AdversarialAccelerator
from hybrimoe_kt.device.emulated.adversary import Adversary
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.runtime import ModelExperts, Runtime, assemble
from tests.support.generated_model import GeneratedModel, Shape

RULES = """
- match:
    name: ^model\\.layers\\.[01]\\.mlp\\.experts$
  replace:
    class: hybrimoe_kt.operators.experts.HybriMoEExperts
    kwargs: {generate_device: "emulated:0", cache_size: 4, cpu_backend: torch_reference, prefetch_size: 2}
  recursive: false
- match:
    name: ^model\\.layers\\.\\d+\\.mlp\\.experts$
  replace:
    class: hybrimoe_kt.operators.experts.HybriMoEExperts
    kwargs: {generate_device: "emulated:1", cache_size: 4, cpu_backend: torch_reference, prefetch_size: 2}
  recursive: false
- match:
    name: ^model\\.embed_tokens$|^model\\.rotary_emb$|^model\\.layers\\.[01](\\.|$)
  replace:
    kwargs: {generate_device: "emulated:0"}
- match:
    name: ^model\\.layers\\.\\d|^model\\.norm$|^lm_head$
  replace:
    kwargs: {generate_device: "emulated:1"}
"""


def test_two_accelerators_answer_as_none(generated: Callable[[Shape], GeneratedModel], tmp_path: Path) -> None:
    model = generated(Shape(layers=4, experts=16, top_k=4))
    rules = tmp_path / "two.yaml"
    rules.write_text(RULES)
    plain = {"accelerator": "none", "cpu_backend": "torch_reference"}
    answers = []
    for overrides in (plain, {}):
        engine = build_engine(model.path, rules_path=rules, progress=False, option_overrides=overrides)
        engine.end_ids = set()
        answers.append(list(engine.tokens(list(range(11, 40)), Sampling(max_new_tokens=16, temperature=0))))
    assert answers[0] == answers[1]
    lanes = engine.runtime.lanes
    assert [(lane.accelerator.name, lane.layers) for lane in lanes] == [("emulated:0", (0, 1)), ("emulated:1", (2, 3))]
    assert lanes[0].queue is not lanes[1].queue
    assert [spec.accelerator for spec in engine.runtime.layer_specs()] == [0, 0, 1, 1]
    assert engine.last_run()["transfers"] > 0
    crossings = engine.loaded.crossings
    assert crossings is not None
    assert crossings.num_crossings == 16, "one prompt step and 15 decode steps"


EXPERTS_ELSEWHERE = """
- match:
    name: ^model\\.layers\\.[01]\\.mlp\\.experts$
  replace:
    class: hybrimoe_kt.operators.experts.HybriMoEExperts
    kwargs: {generate_device: "emulated:0"}
  recursive: false
- match:
    name: ^model\\.layers\\.\\d+\\.mlp\\.experts$
  replace:
    class: hybrimoe_kt.operators.experts.HybriMoEExperts
    kwargs: {generate_device: "emulated:1"}
  recursive: false
"""


@pytest.mark.parametrize("seed", range(4))
def test_captured_steps_wait_for_the_other_accelerator(
    generated: Callable[[Shape], GeneratedModel], write: Callable[[str], Path], seed: int
) -> None:
    """The model's stream does not: what the other one answers comes through the host."""
    model, rules = generated(Shape(layers=4, experts=16, top_k=4)), write(EXPERTS_ELSEWHERE)
    options = {"cpu_backend": "torch_reference", "gpu_backend": "torch_reference", "cache_size": 8, "prefetch_size": 2}

    def adversaries(experts: ModelExperts) -> Runtime:
        names = ("emulated:0", "emulated:1")
        given = {name: AdversarialAccelerator(Adversary(seed + at), name=name) for at, name in enumerate(names)}
        return assemble(experts, accelerators=given)

    answers = []
    for captures in (None, True):
        loaded = load_model(
            model.path, rules_path=rules, option_overrides=options, progress=False, device="emulated:0",
            assemble=adversaries if captures else assemble,
        )  # fmt: skip
        made = TokenGenerator(loaded, set(), captures=captures)
        rows = [made.append(list(range(11, 20))).clone()]
        for _ in range(12):
            rows.append(made.append([int(rows[-1].argmax())]).clone())
        answers.append(torch.stack(rows))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-4)
    assert isinstance(made.loop, CapturedLoop) and made.loop.num_captures > 0
