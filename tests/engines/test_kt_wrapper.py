"""The method for kTransformers' fork of SGLang, between modules that stand in for those of its that it touches.

The fork does not import without CUDA: this shows what the method does if it is called as its sources call it, no more.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.engines.experts import EngineExperts, EngineStep
from tests.device.machine import EXPERTS, HIDDEN, INTER, LAYERS, TOP_K, layers

NAME = "hybrimoe_kt.host.sglang.kt_wrapper"
ARGS = SimpleNamespace(
    disable_cuda_graph=True, disable_shared_experts_fusion=True, chunked_prefill_size=-1, max_prefill_tokens=8,
    tp_size=1, nnodes=1,
)  # fmt: skip
GIVEN = '{"file": "model.gguf", "accelerator": "none", "cpu_backend": "torch_reference", "cpu_threads": 1}'


class Combined(NamedTuple):
    hidden_states: torch.Tensor


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the module registers: which layers it wants, and what it puts in their place."""
    found: list[Any] = []

    def module(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(contents, __path__=[])
        monkeypatch.setitem(sys.modules, name, made)

    for parent in ("", ".srt", ".srt.layers", ".srt.layers.moe", ".srt.layers.quantization"):
        module(f"sglang{parent}")
    module("sglang.srt.distributed", get_tensor_model_parallel_rank=lambda: 0)
    module(
        "sglang.srt.layers.moe.quant_method_registry",
        register_moe_quant_wrapper=lambda name, *both, priority: found.extend(both),
    )
    module("sglang.srt.layers.moe.token_dispatcher", StandardCombineInput=Combined)
    module("sglang.srt.layers.quantization.base_config", FusedMoEMethodBase=object)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    wrapper = importlib.import_module(NAME)
    monkeypatch.delitem(sys.modules, NAME)
    loader = SimpleNamespace(layer_experts=lambda number, **sizes: layers()[number])
    monkeypatch.setattr(wrapper, "open_source", lambda file, tokenizer: SimpleNamespace(loader=loader))
    return found[0], found[1]


def fork_layer(number: int, **given: Any) -> Any:
    fields = {
        "layer_id": number, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN,
        "intermediate_size_per_partition": INTER, "moe_tp_rank": 0, "moe_tp_size": 1, "moe_ep_rank": 0,
        "moe_ep_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**(fields | given))


def loaded(registered: Any, **given: Any) -> list[tuple[Any, Any]]:
    """Layers and their methods, as the fork makes and loads them."""
    wanted, make = registered
    made = [(layer := fork_layer(number, **given), make(layer, None, wanted(layer, ARGS))) for number in range(LAYERS)]
    for layer, method in made:
        method.create_weights(layer=layer, num_experts=EXPERTS)
        method.create_moe_runner(layer, SimpleNamespace(routed_scaling_factor=2.0))
    for layer, method in made:
        method.process_weights_after_loading(layer)
    return made


def answers(made: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    inputs = SimpleNamespace(hidden_states=x, topk_output=(weights, ids, None))
    return [method.apply(layer, inputs).hidden_states for layer, method in made]


def test_layers_are_computed_as_anywhere_else(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIMOE", GIVEN)
    plain = EngineExperts(ExpertOptions(accelerator="none", cpu_backend="torch_reference", cpu_threads=1))
    for layer in layers():
        plain.add(layer)
    plain.start()
    x, weights = torch.randn(3, HIDDEN), torch.rand(3, TOP_K)
    ids = torch.rand(3, EXPERTS).argsort(dim=1)[:, :TOP_K]
    found = answers(loaded(registered), x, weights, ids)
    for number, answer in enumerate(found):
        right = plain.run(number, x, ids, weights * 2.0, EngineStep())
        torch.testing.assert_close(answer, right, rtol=1e-5, atol=1e-5)


def test_nothing_is_wanted_without_the_variable(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRIMOE", raising=False)
    assert registered[0](fork_layer(0), ARGS) is None


@pytest.mark.parametrize(
    ("given", "args", "named"),
    [
        ("{}", {}, '"file"'),
        (GIVEN, {"disable_cuda_graph": False}, "--disable-cuda-graph"),
        ('{"file": "model.gguf", "cache_sise": 1}', {}, "cache_size"),
    ],
)
def test_errors_name_what_is_missing(
    registered: Any, monkeypatch: pytest.MonkeyPatch, given: str, args: dict[str, Any], named: str
) -> None:
    monkeypatch.setenv("HYBRIMOE", given)
    with pytest.raises(ConfigError, match=named):
        registered[0](fork_layer(0), SimpleNamespace(**(vars(ARGS) | args)))
