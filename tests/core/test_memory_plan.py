"""Plans of a card: what is left is for slots, and what does not fit is refused with the numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_kt.core.card_needs import CardNeeds, Kept
from hybrimoe_kt.core.memory_plan import DEFAULT_CONTEXT_TOKENS, MemoryPlan, plan_card, slots_for
from hybrimoe_kt.core.step_memory import SCORE_BYTES, StepShape, score_bytes
from hybrimoe_kt.errors import CapacityError
from hybrimoe_kt.sizes import CacheSize, size_text

STEP = StepShape(chunk_tokens=512, value_bytes=2, hidden=1024, vocabulary=5000, projected=3000, repeated=2000)
NEEDS = CardNeeds(
    packed_bytes=400_000_000,
    float_bytes=1_000_000,
    kept=(Kept(1024, 512), Kept(state_bytes=70_000)),
    step=STEP,
    expert_bytes=5_000_000,
    linear_bytes=1_000_000,
    reserve_bytes=10_000_000,
    slot_bytes={1: 3_000_000, 2: 2_000_000},
    num_experts={1: 8, 2: 8},
    all_experts=24,
)
"""Of three layers with experts one has no kernel."""
AUTO = CacheSize()


def plan(card_bytes: int, context: int | None = None, *, size: CacheSize = AUTO, refuses: bool = True) -> MemoryPlan:
    return plan_card(
        "cuda", card_bytes, NEEDS, size=size, most_tokens=100_000, context_tokens=context, refuses=refuses
    )  # fmt: skip


def test_by_hand() -> None:
    """Keys of 1024 and values of 512 numbers, and one tensor more while it grows; the state once."""
    assert NEEDS.cache_bytes(1000) == 1000 * 2 * (1024 + 512 + 1024) + 70_000
    assert replace(NEEDS, cache_value_bytes=34 / 32).cache_bytes(1000) == 1000 * 2560 * 34 // 32 + 70_000
    states, mask = 512 * 1024 * 16, 512 * 1000 * 4
    attention = 3 * 512 * 3000 * 2 + mask + 1000 * 2000 * 2
    assert STEP.num_bytes(1000) == states + attention + 5000 * 6
    made = plan(600_000_000, 1000)
    used = 401_000_000 + NEEDS.cache_bytes(1000) + STEP.num_bytes(1000) + 16_000_000
    assert sum(line.num_bytes for line in made.lines) == used
    assert made.left_bytes == 600_000_000 - used
    assert made.slots == {1: 8, 2: 8} and made.expert_share == 16 / 24
    assert made.step_bytes == used - 401_000_000


def test_latent_attentions_scores_are_bounded() -> None:
    """A bfloat16 score is there as such, masked, as a float32 probability and as that rounded."""
    assert (score_bytes(2), score_bytes(4)) == (10, 12)
    shape = StepShape(chunk_tokens=512, value_bytes=2, hidden=64, vocabulary=10, scores=128)
    few, many = shape.num_bytes(100), shape.num_bytes(8192)
    assert few == 100 * 64 * 16 + 100 * 100 * 4 + 100 * 100 * 128 * 10 + 60
    assert many == 512 * 64 * 16 + 512 * 8192 * 4 + SCORE_BYTES + 60
    longest = shape.num_bytes(2**20)  # one token's scores are more than that
    assert longest == 512 * 64 * 16 + 512 * 2**20 * 4 + 128 * 2**20 * 10 + 60


@given(card=st.integers(450_000_000, 900_000_000), context=st.integers(1, 120_000))
def test_a_plan_fits_and_wastes_no_slot(card: int, context: int) -> None:
    try:
        made = plan(card, context)
    except CapacityError as error:
        largest = int(str(error).split()[-2]) if "largest" in str(error) else 0
        assert not plan(card, context, refuses=False).fits
        if largest:
            assert plan(card, largest).fits and largest < context
            assert not plan(card, largest + 1, refuses=False).fits
        return
    assert made.context_tokens == made.most_tokens == min(context, 100_000)
    assert made.fits and made.slots_bytes <= made.left_bytes
    assert made.slots_per_layer == 8 or made.left_bytes - made.slots_bytes < 5_000_000


def test_a_context_that_nobody_named_is_what_has_room() -> None:
    assert plan(900_000_000).context_tokens == DEFAULT_CONTEXT_TOKENS
    short = plan(470_000_000)
    assert 256 <= short.context_tokens < DEFAULT_CONTEXT_TOKENS and short.most_tokens == 100_000
    assert short.fits and not plan(470_000_000, short.context_tokens + 1, refuses=False).fits
    assert "--cache_lens" in short.line() and "--cache_lens" not in plan(900_000_000, 100).line()


def test_slots_that_were_asked_for_leave_less_for_the_context() -> None:
    size = CacheSize(num_bytes=40_000_000)
    free, beside = plan(520_000_000, size=CacheSize(per_layer=0)), plan(520_000_000, size=size)
    assert beside.slots == {1: 8, 2: 8} and beside.context_tokens < free.context_tokens
    with pytest.raises(CapacityError, match=r"38\.1 MiB of slots, .*smaller cache_size"):
        plan(460_000_000, size=size)


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    with pytest.raises(CapacityError, match=r"dense weights take 382\.4 MiB, cuda has 286\.1 MiB"):
        plan(300_000_000)
    with pytest.raises(
        CapacityError, match=r"382\.4 MiB, steps, what stays free and a context of 256 tokens take .*cuda has 391"
    ):
        plan(410_000_000)
    with pytest.raises(CapacityError, match=r"a context of 50000 tokens, .* the largest that fits is \d+ tokens$"):
        plan(600_000_000, 50_000)
    refused = replace(NEEDS, context_bytes=20 * 2**20)
    with pytest.raises(CapacityError, match=r"382\.4 MiB, cuda has 392\.0 MiB, 20\.0 MiB of it for CUDA's context"):
        plan_card("cuda", NEEDS.dense_bytes + 10_000_000, refused, size=AUTO, most_tokens=9)
    lacking = refused.num_bytes(256) - 10_000_000
    needed = size_text(refused.num_bytes(256) - refused.dense_bytes - refused.context_bytes)  # which is told apart
    with pytest.raises(CapacityError, match=rf"tokens take {re.escape(needed)}, cuda has .* 20\.0 MiB of it for CUDA"):
        plan_card("cuda", lacking, refused, size=AUTO, most_tokens=50_000)
    assert not plan(300_000_000, refuses=False).fits
    assert plan(300_000_000, refuses=False).left_bytes == 0


def test_forms_for_people_and_for_programs() -> None:
    made = plan(600_000_000, 1000)
    rows = dict(made.rows())
    assert rows["dense weights, packed"] == "381.5 MiB" and rows["left free (reserve_bytes)"] == "9.5 MiB"
    assert rows["slots: 8 a layer, 66.7% of the experts"] == "38.1 MiB"
    data = json.loads(json.dumps(made.as_dict()))
    assert data["lines"]["dense weights, packed"] == 400_000_000 and data["slots_per_layer"] == 8 and data["fits"]
    for part in ("cuda has 572.2 MiB", "dense weights 382.4 MiB", "of 1000 tokens 4.9 MiB", "8 slots a layer"):
        assert part in made.line()


@pytest.mark.parametrize(("size", "wanted"), [(3, 3), (0, 0), (99, 8), ("50%", 4), ("all", 8), ("9MB", 1), ("auto", 2)])
def test_slots_by_every_way_of_asking(size: object, wanted: int) -> None:
    found = slots_for(CacheSize.parse(size), NEEDS.slot_bytes, NEEDS.num_experts, 14_999_999)
    assert found == {1: wanted, 2: wanted}
