"""Every family: a random stock model, llama.cpp's published converter, our host: the same logits and tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.architectures import (
    ARCHITECTURES,
    REFUSED,
    architecture_of_type,
    every_architecture,
)
from hybrimoe_kt.host.hf.gates import logits_and_ids
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.host.hf.look_ahead import moe_gates
from hybrimoe_kt.weights.gguf_file import GgufFile

from . import llama_cpp_converter
from .families import FAMILIES, QUICK, random_model, save_checkpoint
from .llama_cpp import LlamaCpp
from .stock import greedy, logits_of

PROMPT = random.Random(7).choices(range(250), k=23)
PLACES: dict[str, dict[str, Any]] = {
    "none": {"accelerator": "none"},
    "emulated": {"accelerator": "emulated", "cache_size": 3, "prefetch_size": 2},
}

LLAMA_CPP_DIFFERS = {
    "deepseek2": "decides by the number of layers whether queries are low-rank",
    "deepseek2-groups": "chooses DeepSeek-V2's groups by the sum of two experts (V3's rule), not by the best expert",
}
EACH = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]
"""Every family; those that are like another one where it takes minutes."""
STREAMS = {"qwen4exp"}
"""Families of several streams of hidden states, which are mixed in front of experts and not normalised alone."""
MEANS = {"cohere2moe-mean"}
"""Families whose norms take the mean off first."""
BY_ID = {"deepseek4": 1}
"""Families whose first layers, so many, route by a token's id and have no gate to ask."""
NO_GRAPHS = {
    "cohere2moe": "has attention and experts beside each other",
    "cohere2moe-mean": "has attention and experts beside each other",
    "kimi-linear": "has linear attention that decays by channel",
    "bailingmoe3": "has linear attention that decays by channel",
    "mimo2": "has values narrower than keys",
    "llama4": "attends in chunks",
    "minimax-m3": "looks at the blocks that an indexer finds",
    "deepseek4": "has several streams of hidden states",
    "qwen4exp": "has several streams of hidden states",
    "granitehybrid": "has state spaces",
    "nemotron": "has state spaces",
    "nemotron-latent": "has state spaces",
    "gemma4": "has a dense layer beside its experts, and norms around both",
    "hunyuan-moe": "normalises queries and keys after it has turned them",
    "deepseek32": "looks at what an indexer finds",
    "glm-dsa": "looks at what an indexer finds",
    "afmoe": "gates its attention beside, and has norms behind both halves of a layer",
    "lfm2moe": "convolves",
    "laguna": "gates its attention beside",
    "step35": "gates its attention beside",
    "laguna-m": "gates its attention beside",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function from a family to its converted file; those that this run needs are converted together."""
    root = llama_cpp_converter.find()
    if root is None:
        pytest.skip(llama_cpp_converter.MISSING)
    ours = [item for item in request.session.items if "converted" in item.fixturenames]
    wanted = {item.callspec.params["name"] for item in ours}
    folders = {name: tmp_path_factory.mktemp(name) for name in sorted(wanted)}
    for name, folder in folders.items():
        save_checkpoint(name, random_model(name), folder)
    llama_cpp_converter.convert(folders.values(), root)
    return lambda name: folders[name] / "model.gguf"


def test_every_architecture_is_converted_here() -> None:
    """A family added to the package without a row in the table would go untested."""
    covered = {
        "nemotron": "nemotron_h_moe",
        "nemotron-latent": "nemotron_h_moe",
        "qwen35moe-fused": "qwen35moe",
        "mixtral": "llama",
    }
    covered |= dict.fromkeys(("deepseek2-groups", "deepseek3", "kimi-k2", "glm4-moe-lite"), "deepseek2")
    covered |= {
        "granitemoeshared": "granitemoe",
        "solar-open": "glm4moe",
        "sarvam-moe": "bailingmoe2",
        "ling-1": "bailingmoe",
        "cohere2moe-mean": "cohere2moe",
        "ling-2": "bailingmoe2",
        "laguna-m": "laguna",
    }
    assert {covered.get(name, name) for name in FAMILIES} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_equal_the_stock_model(converted: Callable[[str], Path], name: str) -> None:
    file, stock = converted(name), random_model(name)
    wanted = logits_of(stock, PROMPT)
    wanted_tokens, _ = greedy(stock, PROMPT, 12)
    assert wanted.std() > 0.3, "a model whose logits are all alike would prove nothing"
    for place, overrides in PLACES.items():
        ours = load_model(file, option_overrides={"cpu_backend": "torch_reference", **overrides}, progress=False)
        torch.testing.assert_close(logits_of(ours.model, PROMPT), wanted, rtol=0, atol=1e-4, msg=place)
        assert greedy(ours.model, PROMPT, 12)[0] == wanted_tokens, place
        assert not ours.warnings


@pytest.mark.parametrize("name", EACH)
def test_layers_as_graphs_equal_the_stock_model(converted: Callable[[str], Path], name: str) -> None:
    """Token by token, and in pieces; a family without graphs is named here with the reason."""
    options = {"cpu_backend": "torch_reference", "accelerator": "none"}
    ours = load_model(converted(name), option_overrides=options, progress=False, kv_cache_type="f32")
    assert (ours.dense is None) == (name in NO_GRAPHS)
    text = (
        PROMPT if name.startswith("nemotron") else PROMPT * 4
    )  # beyond what graphs take; states drift to other experts
    wanted = logits_of(random_model(name), text)
    within = float(
        1e-3 * (wanted.max() - wanted.min())
    )  # stock state spaces are 5e-4 apart, token by token and at once
    for size in (1, 6, 80):
        engine = TokenGenerator(ours, set())
        for at in range(0, len(text), size):
            piece = text[at : at + size]
            found = engine.append(piece)
            torch.testing.assert_close(found, wanted[at + len(piece) - 1], rtol=0, atol=within, msg=f"{size}, {at}")


@pytest.mark.parametrize("name", EACH)
@torch.inference_mode()
def test_a_layers_gate_is_asked_as_its_router_is(converted: Callable[[str], Path], name: str) -> None:
    """Look-ahead knows every router, what it takes, and the norm in front of it."""
    options = {"cpu_backend": "torch_reference", "accelerator": "emulated", "cache_size": 3}
    ours = load_model(converted(name), option_overrides=options, progress=False)
    gates, body, expert_norm = moe_gates(ours.model, ours.architecture), ours.model.model, ours.architecture.expert_norm
    routed: dict[int, Any] = {}
    normed: dict[int, torch.Tensor] = {}

    def note(layer: int, gate: torch.nn.Module, norm: torch.nn.Module) -> None:
        gate.register_forward_hook(lambda _, args, output: routed.update({layer: (args[0], output)}))
        norm.register_forward_pre_hook(lambda _, args: normed.update({layer: args[0]}))

    for layer, (_, gate) in gates.items():
        note(layer, gate.module, getattr(body.layers[layer], expert_norm))
    logits_of(ours.model, PROMPT)
    assert list(gates) == list(ours.runtime.store.layers)[BY_ID.get(name, 0) :]
    for layer, (_, gate) in gates.items():
        given, answer = routed[layer]
        logits, ids = gate.ask(given.reshape(len(PROMPT), -1))
        theirs, their_ids = logits_and_ids(answer)
        assert torch.equal(logits, gate.logits_of(theirs)) and torch.equal(
            ids.sort(-1).values, their_ids.sort(-1).values
        )
        if name in STREAMS:
            assert gate.norm is None
            continue
        assert gate.norm is not None
        factor = 1.0 if gate.normalises else gate.norm
        entering = normed[layer].reshape(len(PROMPT), -1)
        entering = entering - entering.mean(-1, keepdim=True) if name in MEANS else entering
        scaled = entering * factor  # what enters is this, but for the tokens' sizes
        alike = torch.nn.functional.cosine_similarity(given.reshape(len(PROMPT), -1), scaled)
        torch.testing.assert_close(alike, torch.ones_like(alike), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_the_configuration_of_the_directory_gives_the_same_model(converted: Callable[[str], Path], name: str) -> None:
    """`--model_path` and the metadata alone describe one model."""
    file = converted(name)
    overrides = {"cpu_backend": "torch_reference", "accelerator": "none"}
    alone = load_model(file, option_overrides=overrides, progress=False)
    beside = load_model(file, model_path=file.parent, option_overrides=overrides, progress=False)
    assert torch.equal(logits_of(alone.model, PROMPT), logits_of(beside.model, PROMPT))


@pytest.mark.parametrize("name", [each for each in EACH if each.values[0] not in LLAMA_CPP_DIFFERS])
def test_llama_cpp_reads_the_same_model_in_the_file(converted: Callable[[str], Path], name: str) -> None:
    """The likeliest next tokens have llama.cpp's probabilities: the file means the same there."""
    ours = load_model(converted(name), option_overrides={"cpu_backend": "torch_reference"}, progress=False)
    theirs, compared = LlamaCpp(converted(name)), 0
    for start in range(6):
        prompt = [random.Random(start).randrange(32, 127) for _ in range(9)]
        expected = torch.log_softmax(logits_of(ours.model, prompt)[-1], dim=-1)
        for token, logarithm in theirs.next_token(prompt).items():
            assert abs(float(expected[token]) - logarithm) < 0.02, (start, token)
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", ["qwen35moe-fused"])
def test_fused_experts_are_held_once(converted: Callable[[str], Path], name: str) -> None:
    file = GgufFile(converted(name))
    fused = file.tensor("blk.0.ffn_gate_up_exps.weight")
    ours = load_model(file.path, option_overrides={"accelerator": "none"}, progress=False)
    gate, up, down = ours.runtime.store.layers[0].matrices
    assert gate.data.numel() + up.data.numel() == fused.data.size
    assert gate.data.is_contiguous() and up.data.is_contiguous()
    assert down.data.data_ptr() == ours.loader.file.tensor("blk.0.ffn_down_exps.weight").data.ctypes.data


@pytest.mark.parametrize("name", ["kimi-k2"])
def test_the_configuration_of_kimi_k2_is_read(converted: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """Its files name a type of their own, which is DeepSeek-V3's."""
    file = converted(name)
    config = json.loads((file.parent / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2", "auto_map": auto_map}))
    overrides = {"cpu_backend": "torch_reference", "accelerator": "none"}
    ours = load_model(file, model_path=tmp_path, option_overrides=overrides, progress=False)
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(random_model(name), PROMPT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3next"])
def test_a_state_that_cannot_go_back_is_not_reused(converted: Callable[[str], Path], name: str) -> None:
    """Linear attention keeps one state: a prompt that leaves the last one's path is read from its beginning."""
    engine = build_engine(
        converted(name), option_overrides={"cpu_backend": "torch_reference", "accelerator": "none"}, progress=False
    )
    sampling = Sampling(max_new_tokens=6, temperature=0)
    fresh = list(engine.tokens([*PROMPT[:9], 7, 8], sampling))
    list(engine.tokens(PROMPT, sampling))
    assert list(engine.tokens([*PROMPT[:9], 7, 8], sampling)) == fresh
    assert engine.last_run()["reused_tokens"] == 0
    answer = list(engine.tokens(PROMPT, sampling))
    longer = [*PROMPT, *answer, 5]
    continued = list(engine.tokens(longer, sampling))
    assert engine.last_run()["reused_tokens"] >= len(PROMPT)
    engine.reset()
    assert list(engine.tokens(longer, sampling)) == continued


@pytest.mark.parametrize("name", ["minimax-m3"])
def test_what_an_indexer_has_kept_goes_back_with_the_conversation(converted: Callable[[str], Path], name: str) -> None:
    options = {"cpu_backend": "torch_reference", "accelerator": "none"}
    engine = build_engine(converted(name), option_overrides=options, progress=False)
    sampling = Sampling(max_new_tokens=6, temperature=0)
    other = [*PROMPT[:17], *PROMPT[:9]]
    fresh = list(engine.tokens(other, sampling))
    engine.reset()
    list(engine.tokens(PROMPT, sampling))
    assert list(engine.tokens(other, sampling)) == fresh
    assert engine.last_run()["reused_tokens"] == 17


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    writer = GGUFWriter(str(tmp_path / "model.gguf"), name)
    writer.add_expert_count(8)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=f"architecture '{name}' is not supported: .*; use llama.cpp for it"):
        load_model(tmp_path, progress=False)


@pytest.mark.parametrize("model_type", sorted({name for family in REFUSED.values() for name in family.model_types}))
def test_what_cannot_run_is_refused_by_its_type(tmp_path: Path, model_type: str) -> None:
    assert model_type not in {family.model_type for family in every_architecture()}
    with pytest.raises(ModelError, match=f"model type '{model_type}' is not supported: .*; use llama.cpp for it"):
        architecture_of_type(str(tmp_path), model_type)
