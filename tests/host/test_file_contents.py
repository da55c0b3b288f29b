"""What a file says of a model beside its weights: used as llama.cpp uses it, or refused, for every family."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf import GGUFValueType as V

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.errors import HybriMoEError, ModelError
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.generated_model import GeneratedModel, Shape, Type
from tests.support.rewritten import Tensors, Value, rewritten

from .llama_cpp import next_tokens_apart

Generated = Callable[[Shape], GeneratedModel]

PLACES: dict[str, Any] = {"cpu_backend": "torch_reference", "accelerator": "none"}
PROMPTS = [np.random.default_rng(seed).integers(97, 122, length).tolist() for seed, length in ((0, 40), (1, 90))]
ROUNDING = 0.03
_SMALL = Shape(hidden=128, heads=4, kv_heads=2, head_dim=32, inter=64, dense_inter=64, layers=3, types=(Type.F32,) * 3)
_LATENT = {"architecture": "deepseek2", "q_lora_rank": 64, "rope_dim": 16}
SHAPES = {
    "qwen3moe": _SMALL,
    "qwen2moe": dataclasses.replace(_SMALL, architecture="qwen2moe"),
    "llama": dataclasses.replace(_SMALL, architecture="llama"),
    "olmoe": dataclasses.replace(_SMALL, architecture="olmoe", kv_heads=4),
    "granitemoe": dataclasses.replace(_SMALL, architecture="granitemoe"),
    "minimax-m2": dataclasses.replace(_SMALL, architecture="minimax-m2"),
    "ernie4_5-moe": dataclasses.replace(_SMALL, architecture="ernie4_5-moe"),
    "glm4moe": dataclasses.replace(_SMALL, architecture="glm4moe"),
    "deepseek2": dataclasses.replace(_SMALL, **_LATENT),
    "deepseek3": dataclasses.replace(_SMALL, sigmoid=True, **_LATENT),
    "qwen3next": dataclasses.replace(_SMALL, architecture="qwen3next", layers=4),
    "qwen35moe": dataclasses.replace(_SMALL, architecture="qwen35moe", layers=4),
}
Keys = dict[str, Value]
F, U, S, B = V.FLOAT32, V.UINT32, V.STRING, V.BOOL
_FACTOR: Keys = {"rope.scaling.factor": (4.0, F)}
_YARN = _FACTOR | {"rope.scaling.type": ("yarn", S), "rope.scaling.original_context_length": (64, U)}

USED: dict[str, Keys] = {
    "a factor without a type": _FACTOR,
    "the old name of a factor": {"rope.scale_linear": (4.0, F)},
    "linear": _FACTOR | {"rope.scaling.type": ("linear", S)},
    "a factor of nothing": _FACTOR | {"rope.scaling.type": ("none", S)},
    "yarn": _YARN,
    "yarn without an original context": _YARN | {"rope.scaling.original_context_length": None},
    "yarn and an attention factor": _YARN | {"rope.scaling.attn_factor": (1.5, F)},
    "yarn and a multiplier": _YARN | {"rope.scaling.yarn_log_multiplier": (0.0707, F)},
    "yarn and a multiplier of one": _YARN | {"rope.scaling.yarn_log_multiplier": (0.1, F)},
    "yarn and bounds that llama.cpp does not read": _YARN | {"rope.scaling.yarn_beta_fast": (4.0, F)},
    "an attention factor": {"rope.scaling.attn_factor": (1.5, F)},
    "linear and an attention factor": _FACTOR | {"rope.scaling.attn_factor": (1.5, F)},
    "a base": {"rope.freq_base": (500000.0, F)},
    "the norms' epsilon": {"attention.layer_norm_rms_epsilon": (0.01, F)},
    "a gating function of zero": {"expert_gating_func": (0, U)},
    "no gating function": {"expert_gating_func": None},
    "more active experts": {"expert_used_count": (3, U)},
}
"""What every family takes. The function of families that must have one is looked at below."""
OTHER: dict[str, Keys] = {
    "longrope": _FACTOR | {"rope.scaling.type": ("longrope", S)},
    "no such scaling": _FACTOR | {"rope.scaling.type": ("dynamic", S)},
    "a sliding window": {"attention.sliding_window": (8, U)},
    "both ways": {"attention.causal": (False, B)},
    "groups": {"expert_group_count": (2, U), "expert_group_used_count": (1, U)},
    "softmax": {"expert_gating_func": (1, U)},
    "sigmoid": {"expert_gating_func": (2, U)},
    "softmax of the chosen": {"expert_gating_func": (3, U)},
    "softplus": {"expert_gating_func": (4, U)},
    "normalised weights": {"expert_weights_norm": (True, B)},
    "weights as they are": {"expert_weights_norm": (False, B)},
    "nothing of the norm": {"expert_weights_norm": None},
    "half of the dimensions": {"rope.dimension_count": (16, U)},
    "values of another width": {"attention.value_length": (16, U)},
    "dense layers": {"leading_dense_block_count": (2, U)},
    "shared experts": {"expert_shared_count": (2, U)},
    "experts in every other layer": {"interleave_moe_layer_step": (2, U)},
    "layers that guess": {"nextn_predict_layers": (1, U)},
    "no width of experts": {"expert_feed_forward_length": None},
    "no heads of keys": {"attention.head_count_kv": None},
    "no widths of heads": {"attention.key_length": None, "attention.value_length": None},
    "full attention in every second layer": {"full_attention_interval": (2, U)},
    **{
        name: {name: value}
        for name, value in {
            "attn_logit_softcapping": (5.0, F), "final_logit_softcapping": (5.0, F),
            "router_logit_softcapping": (5.0, F), "attention.scale": (0.05, F), "attention.output_scale": (0.5, F),
            "attention.temperature_length": (8, U), "attention.temperature_scale": (0.5, F),
            "attention.clamp_kqv": (0.5, F), "attention.max_alibi_bias": (8.0, F), "logit_scale": (3.0, F),
            "embedding_scale": (3.0, F), "residual_scale": (0.5, F), "expert_weights_scale": (2.5, F),
            "expert_group_scale": (2.0, F), "experts_per_group": (2, U), "moe_every_n_layers": (2, U),
            "swiglu_clamp_exp": ([1.0] * 3, F), "swin_norm": (True, B), "use_parallel_residual": (True, B),
            "rope.scaling.alpha": (50.0, F), "rope.scaling.yarn_ext_factor": (1.0, F),
            "rope.scaling.yarn_attn_factor": (1.5, F), "rope.dimension_sections": ([4, 6, 6, 0], V.INT32),
            "n_deepstack_layers": (1, U), "pooling_type": (1, U), "token_type_count": (2, U),
        }.items()
    },
}  # fmt: skip
EXTRA_TENSORS = {
    "blk.1.attn_q.bias": (128,), "blk.1.attn_output.bias": (128,), "blk.1.attn_sinks.weight": (4,),
    "blk.1.ffn_gate_exps.bias": (8, 64), "blk.1.ffn_down_exps.scale": (8,), "blk.1.ffn_gate_inp.bias": (8,),
    "blk.1.exp_probs_b.bias": (8,), "blk.1.attn_norm.bias": (128,), "blk.1.post_ffw_norm.weight": (128,),
    "blk.1.attn_q_norm.weight": (32,), "output.bias": (261,), "output_norm.bias": (128,),
    "rope_freqs.weight": (16,), "rope_factors_long.weight": (16,), "blk.1.attn_q.scale": (1,),
}  # fmt: skip
STOCK_INSTEAD = {("deepseek2", "groups")}
"""Where stock Transformers is followed: DeepSeek-V2 ranks groups by their best expert, llama.cpp by the best two."""
QUICK = ("qwen3moe", "deepseek3")


def log_probabilities(path: Path, cpu_backend: str = "torch_reference") -> list[torch.Tensor]:
    model = load_model(path, option_overrides=PLACES | {"cpu_backend": cpu_backend}, progress=False).model
    with torch.inference_mode():
        return [torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].float(), -1) for prompt in PROMPTS]


def assert_as_llama_cpp(path: Path, *, must_run: bool = False, cpu_backend: str = "torch_reference") -> str:
    """Return "equal", "refused" with a sentence, or "llama.cpp refuses"; fail where both answer differently."""
    try:
        ours = log_probabilities(path, cpu_backend)
    except ModelError as error:
        if must_run or "\n" in str(error):
            raise
        return "refused"
    theirs = next_tokens_apart(path, PROMPTS)
    if theirs is None:
        return "llama.cpp refuses"
    for found, wanted in zip(ours, theirs, strict=True):
        assert wanted
        for token, value in wanted.items():
            assert abs(found[token].item() - value) < ROUNDING
    return "equal"


def changed(model: GeneratedModel, out: Path, keys: Keys) -> Path:
    prefix = model.shape.architecture
    return rewritten(model.path, out, {f"{prefix}.{name}": value for name, value in keys.items()})


def check_keys(generated: Generated, folder: Path, family: str, cases: dict[str, Keys], *, must_run: bool) -> list[str]:
    model, results = generated(SHAPES[family]), []
    for name, keys in cases.items():
        try:
            results.append(assert_as_llama_cpp(changed(model, folder / "m.gguf", keys), must_run=must_run))
        except (AssertionError, ModelError) as error:
            raise AssertionError(f"{family}, {name}: {error}") from error
    return results


@pytest.mark.parametrize("family", QUICK)
def test_keys_that_every_family_uses(generated: Generated, tmp_path: Path, family: str) -> None:
    results = check_keys(
        generated, tmp_path, family, USED if family == "qwen3moe" else _without_gating(USED), must_run=True
    )
    assert results.count("equal") == len(results)


def _without_gating(cases: dict[str, Keys]) -> dict[str, Keys]:
    """Of a file that says sigmoid, leaving it out makes another model; `test_a_function_left_out` looks at that."""
    return {name: keys for name, keys in cases.items() if "gating" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_every_key_of_every_family(generated: Generated, tmp_path: Path, family: str) -> None:
    used = check_keys(generated, tmp_path, family, _without_gating(USED), must_run=True)
    assert used.count("equal") == len(used)
    gating = {name: keys for name, keys in USED.items() if "gating" in name}
    known = {name for name in OTHER if (family, name) in STOCK_INSTEAD}
    cases = {name: keys for name, keys in OTHER.items() if name not in known}
    others = check_keys(generated, tmp_path, family, cases | gating, must_run=False)
    assert "equal" in others and "refused" in others


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in SHAPES])
def test_no_tensor_is_left_out_in_silence(generated: Generated, tmp_path: Path, family: str) -> None:
    model = generated(SHAPES[family])
    for name, shape in EXTRA_TENSORS.items():
        value = (1 + 0.5 * np.random.default_rng(0).random(shape)).astype(np.float32)

        def add(tensors: Tensors, name: str = name, value: np.ndarray = value) -> Tensors:
            return tensors | {name: (value, GGMLQuantizationType.F32)} if name not in tensors else tensors

        path = rewritten(model.path, tmp_path / "m.gguf", tensors=add)
        verdict = assert_as_llama_cpp(path)
        if verdict == "refused":
            with pytest.raises(ModelError, match=name.replace(".", r"\.")):
                log_probabilities(path)


@pytest.mark.parametrize("norm", [True, None])
def test_a_function_left_out(generated: Generated, tmp_path: Path, norm: bool | None) -> None:
    """DeepSeek files with a correction and no gating function rank by softmax and the correction."""
    keys: Keys = {"expert_gating_func": None, "expert_weights_norm": norm if norm is None else (norm, B)}
    path = changed(generated(SHAPES["deepseek3"]), tmp_path / "m.gguf", keys)
    assert assert_as_llama_cpp(path, must_run=True) == "equal"


def test_frequencies_of_the_files_own(generated: Generated, tmp_path: Path) -> None:
    """Llama-type files have a divisor for each frequency; llama.cpp applies it before every scaling."""
    divisors = np.linspace(1, 8, 16).astype(np.float32)
    model = generated(SHAPES["llama"])

    def add(tensors: Tensors) -> Tensors:
        return tensors | {"rope_freqs.weight": (divisors, GGMLQuantizationType.F32)}

    for keys in ({}, _YARN):
        scaled = {f"llama.{name}": value for name, value in keys.items()}
        path = rewritten(model.path, tmp_path / "m.gguf", scaled, add)
        assert assert_as_llama_cpp(path, must_run=True) == "equal"
    short = rewritten(model.path, tmp_path / "m.gguf", tensors=lambda found: add(found) | {
        "rope_freqs.weight": (divisors[:4], GGMLQuantizationType.F32)})  # fmt: skip
    with pytest.raises(ModelError, match=r"rope_freqs\.weight has 4 values, 32 dimensions are rotated"):
        load_model(short, option_overrides=PLACES, progress=False)


@pytest.mark.parametrize("family", ["qwen3moe", "glm4moe"])
def test_values_for_each_layer(generated: Generated, tmp_path: Path, family: str) -> None:
    names = ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "expert_used_count")
    model = generated(SHAPES[family])
    fields = GGUFReader(str(model.path)).fields
    for name in names[:3]:
        value = fields[f"{family}.{name}"].contents()
        assert (
            assert_as_llama_cpp(changed(model, tmp_path / "m.gguf", {name: ([value] * 3, U)}), must_run=True) == "equal"
        )
    with pytest.raises(ModelError, match=r"head_count differs from layer to layer \(\[4, 4, 2\]\)"):
        load_model(changed(model, tmp_path / "m.gguf", {names[0]: ([4, 4, 2], U)}), progress=False)


def test_ollamas_layout(generated: Generated, tmp_path: Path) -> None:
    """No heads of keys where attention is linear, a bias without its ending, pictures' tensors beside the text's."""
    model = generated(SHAPES["qwen35moe"])
    wanted = log_probabilities(model.path)

    def as_ollama(tensors: Tensors) -> Tensors:
        renamed = {name.replace("ssm_dt.bias", "ssm_dt"): value for name, value in tensors.items()}
        return renamed | {"v.blk.0.attn_q.weight": tensors["output_norm.weight"]}

    keys = {"qwen35moe.attention.head_count_kv": ([0, 0, 0, 2], U), "qwen35moe.vision.block_count": (27, U)}
    found = log_probabilities(rewritten(model.path, tmp_path / "m.gguf", keys, as_ollama))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_latent_matrices_in_both_forms(generated: Generated, tmp_path: Path) -> None:
    """Some converters keep what newer files split; the whole one is used, and the halves are not missed."""
    shape = dataclasses.replace(SHAPES["deepseek2"], split_kv_b=False)
    whole, halves = generated(shape), generated(SHAPES["deepseek2"])
    found = {tensor.name: tensor for tensor in GGUFReader(str(halves.path)).tensors}

    def add(tensors: Tensors) -> Tensors:
        both = {name: found[name] for name in found if name.endswith(("attn_k_b.weight", "attn_v_b.weight"))}
        return tensors | {name: (np.array(tensor.data), tensor.tensor_type) for name, tensor in both.items()}

    ours = log_probabilities(rewritten(whole.path, tmp_path / "m.gguf", tensors=add))
    assert all(torch.equal(a, b) for a, b in zip(ours, log_probabilities(whole.path), strict=True))


@pytest.mark.parametrize("family", ["qwen2moe", "qwen35moe"])
def test_a_width_left_out(generated: Generated, tmp_path: Path, family: str) -> None:
    model = generated(SHAPES[family])
    keys: Keys = {"expert_shared_feed_forward_length": None, "expert_feed_forward_length": None}
    ours = log_probabilities(changed(model, tmp_path / "m.gguf", keys))
    assert all(torch.equal(a, b) for a, b in zip(ours, log_probabilities(model.path), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.merges", None, "merges is missing, without which every byte would be a token"),
        ("tokenizer.ggml.scores", (["a"], S), "scores are not numbers"),
        ("tokenizer.ggml.add_bos_token", ("false", S), "add_bos_token is 'false', which is of the wrong type"),
        ("tokenizer.chat_template", (4, U), "chat_template is '4', which is of the wrong type"),
    ],
)
def test_a_vocabulary_that_cannot_be(
    generated: Generated, tmp_path: Path, key: str, value: Value, message: str
) -> None:
    path = rewritten(generated(SHAPES["qwen3moe"]).path, tmp_path / "m.gguf", {key: value})
    with pytest.raises(ModelError, match=message):
        build_engine(path, progress=False, option_overrides=PLACES)


_ODD: list[Value] = [
    None, (0, U), (1, U), (-1, V.INT32), (3, U), (2**31, U), (7, V.UINT8), (0.0, F), (1.0, F), (-2.5, F),
    (float("nan"), F), (float("inf"), F), (1e9, V.FLOAT64), ("", S), ("yarn", S), ("x" * 300, S), (True, B), (False, B),
    ([1, 2, 3], V.INT32), ([2, 2], U), ([0.5], F), (["a", "b"], S),
]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "compared"), [(40, 10), pytest.param(2000, 200, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_any_key_changed(generated: Generated, tmp_path: Path, count: int, compared: int) -> None:
    """One key is left out, or has another value or type: a sentence, or an answer; a sample of those is llama.cpp's."""
    draw = random.Random(20250405)
    known = sorted({name for keys in (USED | OTHER).values() for name in keys})
    left = compared
    for _ in range(count):
        family = draw.choice([name for name in SHAPES if count > 100 or name in QUICK])
        model = generated(SHAPES[family])
        own = [name for name in GGUFReader(str(model.path)).fields if not name.startswith("GGUF.")][1:]
        key = draw.choice(own if draw.random() < 0.65 else [f"{model.shape.architecture}.{name}" for name in known])
        value = draw.choice(_ODD)
        path = rewritten(model.path, tmp_path / "m.gguf", {key: value})
        try:
            engine = build_engine(path, progress=False, option_overrides=PLACES)
            engine.chat("hi", sampling=Sampling(max_new_tokens=2, temperature=0))
            if left:
                left -= 1
                assert_as_llama_cpp(path)
        except HybriMoEError as error:
            if "\n" in str(error):
                raise AssertionError(f"{family}, {key} = {value}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{family}, {key} = {value}: {error!r}") from error
    assert left < compared
