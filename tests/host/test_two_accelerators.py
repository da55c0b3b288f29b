"""Layers divided over two accelerators by a rule file: the same tokens, each with its own slots and link.

Experts and dense weights both: the hidden states cross once in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
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
