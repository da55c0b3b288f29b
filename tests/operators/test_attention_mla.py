"""Absorbed attention equals the stock module it replaces, prompt by prompt and step by step."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml.up_projections import FusedUpProjections, SplitUpProjections
from hybrimoe_kt.errors import ConfigError, HostCompatibilityError
from hybrimoe_kt.host.hf.dense_upload import DenseOnAccelerators
from hybrimoe_kt.operators import attention_mla
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from tests.support.packed import PackedLoader, packed_matrix
from tests.support.random_blocks import Type

FAMILIES = {
    "v2": (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding, {}),
    "v3": (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding, {}),
    "v3-halves": (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding, {"rope_interleave": False}),
}


def config(q_lora_rank: int | None, family: str = "v2") -> DeepseekV2Config | DeepseekV3Config:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}
    rope |= {"original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    made = FAMILIES[family][0](
        hidden_size=96, num_attention_heads=6, num_key_value_heads=6, num_hidden_layers=1, kv_lora_rank=40,
        v_head_dim=24, q_lora_rank=q_lora_rank, qk_rope_head_dim=16, qk_nope_head_dim=32, max_position_embeddings=256,
        rope_parameters=rope, **FAMILIES[family][3],
    )  # fmt: skip
    made._attn_implementation = "sdpa"
    return made


def cached(module: torch.nn.Module, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The cache under the name that the installed Transformers gives it."""
    names = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("absorb_for_prefill", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 28])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_equals_stock_over_prompt_and_steps(
    family: str, q_lora_rank: int | None, batch: int, absorb_for_prefill: bool
) -> None:
    torch.manual_seed(0)
    settings = config(q_lora_rank, family)
    stock = FAMILIES[family][1](settings, 0).eval()
    ours = AbsorbedMLA(
        "model.layers.0.self_attn", PackedLoader(), settings, stock, absorb_for_prefill=absorb_for_prefill
    )
    rotary, caches = FAMILIES[family][2](settings), [DynamicCache(config=settings) for _ in range(2)]
    at = 0
    for tokens in (7, 1, 1, 4, 1):
        hidden, positions = torch.randn(batch, tokens, 96), torch.arange(at, at + tokens)[None]
        mask = torch.ones(tokens, at + tokens, dtype=torch.bool).tril(at)[None, None]
        angles = rotary(hidden, positions)
        wanted = stock(hidden, attention_mask=mask, position_embeddings=angles, **cached(stock, caches[0]))[0]
        masked = mask if tokens > 1 else None
        found = ours(hidden, attention_mask=masked, position_embeddings=angles, **cached(stock, caches[1]))[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        at += tokens


@torch.inference_mode()
def test_additive_masks_and_no_mask_mean_the_same() -> None:
    torch.manual_seed(1)
    settings = config(None)
    ours = AbsorbedMLA("model.layers.0.self_attn", PackedLoader(), settings, DeepseekV2Attention(settings, 0))
    hidden, angles = (
        torch.randn(1, 5, 96),
        DeepseekV2RotaryEmbedding(settings)(torch.randn(1, 5, 96), torch.arange(5)[None]),
    )
    boolean = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~boolean, torch.finfo(torch.float32).min)
    results = [ours(hidden, mask, None, angles)[0] for mask in (boolean, additive, None)]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("masked", [True, False])
@torch.inference_mode()
def test_few_queries_at_a_time_read_the_same(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """Behind a context of 3, as many at a time as the scores' memory allows: two of 5, then one."""
    torch.manual_seed(2)
    settings = config(None)
    ours = AbsorbedMLA("model.layers.0.self_attn", PackedLoader(), settings, DeepseekV2Attention(settings, 0))
    hidden, rotary = torch.randn(1, 8, 96), DeepseekV2RotaryEmbedding(settings)
    angles = [rotary(hidden[:, piece], torch.arange(8)[None, piece]) for piece in (slice(0, 3), slice(3, 8))]
    mask = torch.ones(5, 8, dtype=torch.bool).tril(3)[None, None] if masked else None
    found, read = [], attention_mla.read_latents
    for limit, wanted in ((2**28, [5]), (2 * 6 * 8 * 12, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(attention_mla, "SCORE_BYTES", limit)
        cache = DynamicCache(config=settings)
        ours(hidden[:, :3], position_embeddings=angles[0], past_key_values=cache)
        with monkeypatch.context() as patch:
            sizes: list[int] = []

            def noted(query: torch.Tensor, *rest: Any, sizes: list[int] = sizes) -> torch.Tensor:
                sizes.append(query.shape[2])
                return read(query, *rest)

            patch.setattr(attention_mla, "read_latents", noted)
            found.append(ours(hidden[:, 3:], mask, position_embeddings=angles[1], past_key_values=cache)[0])
        assert sizes == wanted
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.inference_mode()
def test_a_step_reads_the_cache_by_either_name(name: str) -> None:
    """Under a name that it did not know the cache would be ignored, and answers wrong without a word."""
    settings = config(None)
    ours = AbsorbedMLA("model.layers.0.self_attn", PackedLoader(), settings, DeepseekV2Attention(settings, 0))
    cache, rotary = DynamicCache(config=settings), DeepseekV2RotaryEmbedding(settings)
    for at in range(3):
        angles = rotary(torch.randn(1, 1, 96), torch.tensor([[at]]))
        ours(torch.randn(1, 1, 96), position_embeddings=angles, **{name: cache})
        assert cache.get_seq_length() == at + 1


def test_an_argument_that_only_a_later_version_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: object, hidden_states: object, memory: object = None, **kwargs: object) -> None: ...

    monkeypatch.setattr(DeepseekV2Attention, "forward", forward)
    with pytest.raises(HostCompatibilityError, match=r"transformers 5\.\S+ takes 'memory', which"):
        AbsorbedMLA("model.layers.0.self_attn", PackedLoader(), config(None), DeepseekV2Attention(config(None), 0))


def test_other_attention_is_refused() -> None:
    with pytest.raises(HostCompatibilityError, match="replaces latent attention"):
        AbsorbedMLA("model.layers.0.self_attn", PackedLoader(), config(None), torch.nn.Linear(2, 2))


needs_ggml = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
HEADS, RANK, NOPE, VALUE = 6, 96, 64, 32
FORMS = {"split": SplitUpProjections, "fused": FusedUpProjections}
TOLERANCE = {Type.F16: 2e-3}
"""Relative to attention with dequantised up-projections; 0.03 of blocks and in bfloat16. Measured 0.0003, 0.0095."""


def latent_config() -> DeepseekV2Config:
    """Widths of which blocks of 32 can be made, no two alike."""
    made = DeepseekV2Config(
        hidden_size=96, num_attention_heads=HEADS, num_key_value_heads=HEADS, num_hidden_layers=1, kv_lora_rank=RANK,
        v_head_dim=VALUE, q_lora_rank=None, qk_rope_head_dim=16, qk_nope_head_dim=NOPE, max_position_embeddings=256,
    )  # fmt: skip
    made._attn_implementation = "sdpa"
    return made


def packed_up(form: str, keys: Type, values: Type) -> tuple[PackedLoader, torch.Tensor]:
    """What a file has of the up-projections, and `kv_b_proj.weight` with their values."""
    name = "blk.0.attn_{}.weight".format
    if form == "fused":
        both, exact = packed_matrix(values, HEADS * (NOPE + VALUE), RANK)
        return PackedLoader(tensors={name("kv_b"): both}), exact
    up_keys, k_b = packed_matrix(keys, RANK, NOPE, heads=HEADS, seed=1)
    up_values, v_b = packed_matrix(values, VALUE, RANK, heads=HEADS, seed=2)
    whole = torch.cat((k_b.transpose(1, 2), v_b), dim=1).flatten(0, 1)
    return PackedLoader(tensors={name("k_b"): up_keys, name("v_b"): up_values}), whole


@needs_ggml
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("keys", "values"),
    [(Type.Q8_0, Type.Q8_0), (Type.Q4_0, Type.Q5_1), (Type.F16, Type.F16)],
    ids=lambda kind: kind.name,
)
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_packed_up_projections_answer_as_floats_do(
    form: str, keys: Type, values: Type, batch: int, dtype: torch.dtype
) -> None:
    """Over a prompt and steps, all with one cache each."""
    torch.manual_seed(0)
    settings = latent_config()
    stock = DeepseekV2Attention(settings, 0).eval()
    loader, weight = packed_up(form, keys, values)
    stock.kv_b_proj.weight.copy_(weight)
    stock.to(dtype)
    exact = AbsorbedMLA("model.layers.0.self_attn", loader, settings, stock, cpu="float")
    ours = AbsorbedMLA("model.layers.0.self_attn", loader, settings, stock)
    assert isinstance(ours._up, FORMS[form]) and exact._up is None
    assert ours.kv_b_proj is None and "kv_b_proj.weight" not in ours.state_dict()
    rotary, caches, at = DeepseekV2RotaryEmbedding(settings), [DynamicCache(config=settings) for _ in range(2)], 0
    within = 0.03 if dtype == torch.bfloat16 else TOLERANCE.get(values, 0.03)
    for tokens in (7, 1, 1, 70, 1):
        hidden, positions = torch.randn(batch, tokens, 96, dtype=dtype), torch.arange(at, at + tokens)[None]
        angles = rotary(hidden, positions)
        mask = torch.ones(tokens, at + tokens, dtype=torch.bool).tril(at)[None, None] if tokens > 1 else None
        wanted, found = (
            module(hidden, attention_mask=mask, position_embeddings=angles, **cached(stock, cache))[0]
            for module, cache in zip((exact, ours), caches, strict=True)
        )
        assert found.dtype == dtype and found.shape == wanted.shape
        assert (found - wanted).float().norm() <= within * wanted.float().norm()
        at += tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keys", "values"), [(Type.Q8_0, Type.Q4_0), (Type.F16, Type.F16)], ids=lambda kind: kind.name)
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_packed_up_projections_on_an_accelerator(form: str, keys: Type, values: Type, dtype: torch.dtype) -> None:
    """The same bits as floats where torch multiplies, but for bfloat16's of the keys in one tensor."""
    torch.manual_seed(0)
    settings = latent_config()
    stock = DeepseekV2Attention(settings, 0).eval()
    loader, weight = packed_up(form, keys, values)
    stock.kv_b_proj.weight.copy_(weight)
    stock.to(dtype)
    exact = AbsorbedMLA("model.layers.0.self_attn", loader, settings, stock, cpu="float")
    ours = AbsorbedMLA("model.layers.0.self_attn", loader, settings, stock, generate_device="emulated:0")
    assert ours.kv_b_proj is None and "kv_b_proj.weight" not in ours.state_dict()
    there = DenseOnAccelerators(ours)
    there.load(dtype, progress=False)
    assert there.names() == {matrix.name for matrix in loader._tensors.values()}
    in_file = sum(matrix.data.numel() for matrix in loader._tensors.values())
    assert there.file_bytes == in_file
    floats = HEADS * NOPE * RANK * dtype.itemsize if form == "fused" else 0
    left = 0 if form == "split" else in_file * NOPE // (NOPE + VALUE)
    assert in_file - left + floats <= there.device_bytes(dtype) < in_file - left + floats + 512
    rotary, at = DeepseekV2RotaryEmbedding(settings), 0
    caches = [DynamicCache(config=settings) for _ in range(2)]
    for tokens in (7, 1, 1):
        hidden, positions = torch.randn(2, tokens, 96, dtype=dtype), torch.arange(at, at + tokens)[None]
        angles = rotary(hidden, positions)
        mask = torch.ones(tokens, at + tokens, dtype=torch.bool).tril(at)[None, None] if tokens > 1 else None
        wanted, found = (
            module(hidden, attention_mask=mask, position_embeddings=angles, **cached(stock, cache))[0]
            for module, cache in zip((exact, ours), caches, strict=True)
        )
        assert found.dtype == dtype and found.shape == wanted.shape
        assert (found - wanted).float().norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * wanted.float().norm()
        at += tokens


@needs_ggml
def test_up_projections_stay_floats_where_they_must() -> None:
    """Where prompts go to the stock module, which wants them; on other devices; by wish; and in files of floats."""
    settings = latent_config()
    loader, _ = packed_up("split", Type.Q8_0, Type.Q8_0)
    for loads, options in [
        (loader, {"absorb_for_prefill": False}),
        (loader, {"generate_device": "cuda:0"}),
        (loader, {"cpu": "float"}),
        (PackedLoader(), {}),
    ]:
        stock = DeepseekV2Attention(settings, 0)
        ours = AbsorbedMLA("model.layers.0.self_attn", loads, settings, stock, **options)
        assert ours._up is None and ours.kv_b_proj is stock.kv_b_proj
    with pytest.raises(ConfigError, match="unknown cpu 'flaot', did you mean 'float'"):
        AbsorbedMLA("model.layers.0.self_attn", loader, settings, stock, cpu="flaot")


@needs_ggml
def test_up_projections_of_another_shape_are_left_to_what_loads_floats() -> None:
    """Which says what is wrong with them."""
    settings = latent_config()
    settings.qk_nope_head_dim, settings.v_head_dim = 96, 64
    for form in FORMS:
        loader, _ = packed_up(form, Type.Q8_0, Type.Q8_0)
        stock = DeepseekV2Attention(settings, 0)
        assert AbsorbedMLA("model.layers.0.self_attn", loader, settings, stock)._up is None
