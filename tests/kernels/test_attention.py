"""Attention of one token against its naive forms, at lengths that the device knows; in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hybrimoe_kt.backends.gpu_triton import target_of
from hybrimoe_kt.kernels.attention import AttentionKernels
from hybrimoe_kt.kernels.attention_configs import AttentionConfig, attention_config, merge_config, num_splits
from hybrimoe_kt.kernels.decode_attention import naive_decode_attention
from hybrimoe_kt.kernels.latent_attention import naive_latent_attention
from hybrimoe_kt.kernels.merge_splits import merge_splits, naive_merge_splits
from hybrimoe_kt.kernels.targets import TARGETS
from tests.kernels.layers import DEVICE, relative_error

pytestmark = pytest.mark.kernels

TARGET = target_of(DEVICE)
NAN = float("nan")
WITHIN = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Weights are rounded to the dtype of the values. Measured at most 4e-7 and 3e-4."""


def config_of(group: int, width: int, itemsize: int) -> AttentionConfig:
    config = attention_config(TARGET, group, width, itemsize)
    assert config is not None
    return config


BLOCK = config_of(4, 64, 2).block


def length_of(tokens: int) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int64, device=DEVICE)


def states(*shape: int, held: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random numbers, and NaN where no token is held: a kernel that reads there shows it."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[..., held:, :] = NAN
    return made.to(dtype).to(DEVICE)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, **given: object
) -> torch.Tensor:
    out = torch.full_like(query, NAN)
    AttentionKernels(TARGET).grouped(query, keys, values, length, 0.17, out, **given)()  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(8, 2, 64), (3, 1, 96), (16, 1, 128), (4, 2, 256), (2, 2, 40)], ids=str
)
def test_decode_attention(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    held = 5 * BLOCK + 3
    query = states(heads, width, held=heads, dtype=dtype, seed=1)
    keys, values = (states(kv_heads, held + 40, width, held=held, dtype=dtype, seed=seed) for seed in (2, 3))
    wanted = naive_decode_attention(query.cpu(), keys.cpu(), values.cpu(), held, 0.17)
    assert relative_error(attend(query, keys, values, length_of(held)), wanted) < WITHIN[dtype]


@pytest.mark.parametrize(
    "held", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1, 6 * BLOCK + 1, 8 * BLOCK]
)
def test_any_length_is_attended_to(held: int) -> None:
    """Around the borders of blocks and splits, of which the interpreter has three, and all that there is room for."""
    query = states(4, 64, held=4, dtype=torch.float16, seed=1)
    keys, values = (states(2, 8 * BLOCK, 64, held=held, dtype=torch.float16, seed=seed) for seed in (2, 3))
    wanted = naive_decode_attention(query.cpu(), keys.cpu(), values.cpu(), held, 0.17)
    assert relative_error(attend(query, keys, values, length_of(held)), wanted) < 1e-3


def test_a_launch_reads_the_length_anew() -> None:
    """Nothing but the number in the tensor differs between two launches with the same arguments."""
    query = states(4, 64, held=4, dtype=torch.float16, seed=1)
    keys, values = (states(2, 6 * BLOCK, 64, held=6 * BLOCK, dtype=torch.float16, seed=seed) for seed in (2, 3))
    out, length = torch.empty_like(query), length_of(1)
    launch = AttentionKernels(TARGET).grouped(query, keys, values, length, 0.17, out)
    for held in (5 * BLOCK + 2, 7, 6 * BLOCK):
        length.fill_(held)
        launch()
        wanted = naive_decode_attention(query.cpu(), keys.cpu(), values.cpu(), held, 0.17)
        assert relative_error(out, wanted) < 1e-3, held


@pytest.mark.parametrize("window", [1, BLOCK + 1, 4 * BLOCK, 99 * BLOCK])
def test_a_window_is_all_that_is_seen(window: int) -> None:
    held = 5 * BLOCK + 3
    query = states(4, 64, held=4, dtype=torch.float16, seed=1)
    keys, values = (states(2, 6 * BLOCK, 64, held=held, dtype=torch.float16, seed=seed) for seed in (2, 3))
    keys[:, : max(0, held - window)] = NAN
    wanted = naive_decode_attention(query.cpu(), keys.cpu(), values.cpu(), held, 0.17, window)
    assert relative_error(attend(query, keys, values, length_of(held), window=window), wanted) < 1e-3


def test_sinks_take_a_share_of_the_weights() -> None:
    held = 2 * BLOCK + 3
    query = states(4, 64, held=4, dtype=torch.float16, seed=1)
    keys, values = (states(2, 3 * BLOCK, 64, held=held, dtype=torch.float16, seed=seed) for seed in (2, 3))
    sinks = torch.tensor([-2.0, 0.0, 3.0, 9.0], device=DEVICE)
    wanted = naive_decode_attention(query.cpu(), keys.cpu(), values.cpu(), held, 0.17, sinks=sinks.cpu())
    assert relative_error(attend(query, keys, values, length_of(held), sinks=sinks), wanted) < 1e-3
    without = naive_decode_attention(query.cpu(), keys.cpu(), values.cpu(), held, 0.17)
    assert relative_error(wanted, without) > 0.1


def test_a_room_may_lie_in_a_larger_one() -> None:
    """Heads and tokens are where strides say: of a cache's room, and of queries as a projection leaves them."""
    held = 2 * BLOCK + 3
    query = states(4, 2 * 64, held=4, dtype=torch.float16, seed=1)[:, 64:]
    keys = states(2, 3 * BLOCK, 3 * 64, held=held, dtype=torch.float16, seed=2)[:, 5:, 64:128]
    values = states(3 * BLOCK, 2, 64, held=2, dtype=torch.float16, seed=3).transpose(0, 1)[:, 5:]
    wanted = naive_decode_attention(query.cpu(), keys.cpu(), values.cpu(), held - 5, 0.17)
    out = torch.full((4, 64), NAN, dtype=torch.float16, device=DEVICE)
    AttentionKernels(TARGET).grouped(query, keys, values, length_of(held - 5), 0.17, out)()
    assert relative_error(out, wanted) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (5, 96, 16), (40, 64, 8)], ids=str)
def test_latent_attention(heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
    query = states(heads, rank, held=heads, dtype=dtype, seed=1)
    rotated_query = states(heads, rope, held=heads, dtype=dtype, seed=2)
    kernels, length = AttentionKernels(TARGET), length_of(1)
    out = torch.full_like(query, NAN)
    for held in (1, BLOCK, 3 * BLOCK + 1, 5 * BLOCK):
        latents = states(5 * BLOCK, rank, held=held, dtype=dtype, seed=3)
        rotated = states(5 * BLOCK, rope, held=held, dtype=dtype, seed=4)
        length.fill_(held)
        kernels.latent(query, rotated_query, latents, rotated, length, 0.06, out)()
        wanted = naive_latent_attention(*(part.cpu() for part in (query, rotated_query, latents, rotated)), held, 0.06)
        assert relative_error(out, wanted) < WITHIN[dtype], held


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=["bf16-fp16", "bf16-fp32", "fp16-fp32"],
)
def test_rooms_are_rounded_to_the_dtype_of_the_query(asked: torch.dtype, kept: torch.dtype) -> None:
    """Where launch shapes are the same, which they are in the interpreter: every bit of rounding them before."""
    held, kernels = 3 * BLOCK + 3, AttentionKernels(TARGET)
    query = states(8, 64, held=8, dtype=asked, seed=1)
    rooms = [states(2, held + 40, 64, held=held, dtype=kept, seed=seed) for seed in (2, 3)]
    rounded = [room.to(asked) for room in rooms]
    found, before = (attend(query, *each, length_of(held)) for each in (rooms, rounded))
    wanted = naive_decode_attention(query.cpu(), *(room.cpu() for room in rounded), held, 0.17)
    assert found.dtype == asked and relative_error(found, wanted) < WITHIN[asked]

    turned = states(8, 16, held=8, dtype=asked, seed=4)
    latents, rotated = (states(held + 40, width, held=held, dtype=kept, seed=width) for width in (64, 16))
    read, read_before = torch.full_like(query, NAN), torch.full_like(query, NAN)
    kernels.latent(query, turned, latents, rotated, length_of(held), 0.06, read)()
    kernels.latent(query, turned, latents.to(asked), rotated.to(asked), length_of(held), 0.06, read_before)()
    parts = [part.cpu() for part in (query, turned, latents.to(asked), rotated.to(asked))]
    assert relative_error(read, naive_latent_attention(*parts, held, 0.06)) < WITHIN[asked]
    if TARGET.interpreted:
        assert torch.equal(found, before) and torch.equal(read, read_before)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_merge_splits(with_sinks: bool) -> None:
    """More splits than are added together, weights that no float could hold as such, and one that nobody made."""
    config, splits = config_of(1, 40, 4), 21
    held = 20 * config.block - 3
    answers = states(3, splits, 40, held=splits - 1, dtype=torch.float32, seed=1)
    weights = (1000 + 3 * torch.randn(3, splits, generator=torch.Generator().manual_seed(2))).to(DEVICE)
    weights[:, -1] = NAN
    sinks = torch.tensor([690.0, 694.0, 700.0], device=DEVICE) if with_sinks else None
    out = torch.full((3, 40), NAN, device=DEVICE)
    merge_splits(answers, weights, length_of(held), out, config, merge_config(TARGET, 40), 0, sinks)
    lower = 1000 * 0.6931471805599453
    wanted = naive_merge_splits(
        answers[:, :-1].cpu(), weights[:, :-1].cpu() - 1000, None if sinks is None else sinks.cpu() - lower
    )
    assert relative_error(out, wanted) < 1e-4


def test_launch_shapes_go_with_the_device_and_not_with_the_length() -> None:
    large, small = TARGETS["sm_90"], TARGETS["sm_86"]
    assert num_splits(large, 4) == 66 and num_splits(small, 4) == 42
    assert num_splits(large, 1) == 128 and num_splits(small, 1000) == 1
    blocks = {width: attention_config(large, 8, width, 2) for width in (64, 96, 128, 256)}
    assert [config and config.block for config in blocks.values()] == [128, 64, 64, 32]


@pytest.mark.parametrize(
    ("target", "heads", "kv_heads", "width", "dtype"),
    [
        ("sm_90", 34, 2, 128, torch.float16),
        ("sm_90", 4, 2, 512, torch.float16),
        ("sm_90", 4, 2, 36, torch.float16),
        ("gfx1100", 4, 2, 256, torch.float32),
        ("gfx1100", 16, 0, 512, torch.float16),
    ],
)
def test_what_would_spill_is_refused(target: str, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    """Without key-value heads: latents."""
    query, room = torch.empty(heads, width, dtype=dtype), torch.empty(kv_heads or 1, 8, width, dtype=dtype)
    kernels = AttentionKernels(TARGETS[target])
    assert kernels.refuses(query, room, room, is_latent=not kv_heads) is not None
    room = torch.empty(8, 8, 128, dtype=torch.bfloat16)
    assert kernels.refuses(torch.empty(16, 128, dtype=torch.float16), room, room) is None
    assert "would be widened" in (kernels.refuses(torch.empty(16, 128), room, room) or "")
