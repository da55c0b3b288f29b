"""What ranks compute adds up to the whole layer, whichever way it is shared out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.expert_form import ExpertForm
from hybrimoe_kt.host.engines.experts import experts_of_rank
from hybrimoe_kt.host.engines.gates import LocalExperts
from hybrimoe_kt.host.engines.share import RankShare
from tests.support.expert_layers import EXPERTS, floats, layer, reference, step
from tests.support.random_blocks import Type

PLACEMENTS = {
    "together": [[0, 1, 2, 3, 4], [5, 6, 7]],
    "in turn": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "three ranks": [[0, 1, 2], [3, 4, 5], [6, 7]],
}


def local_of(experts: list[int]) -> torch.Tensor:
    """As engines give it: this rank's number of every expert, -1 for others."""
    table = torch.full((EXPERTS,), -1, dtype=torch.int32)
    table[experts] = torch.arange(len(experts), dtype=torch.int32)
    return table


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q8_0, Type.F32])
def test_whole_experts_add_up(placement: str, kind: Type) -> None:
    whole, (hidden, ids, weights) = layer(kind), step(5)
    total = torch.zeros_like(hidden)
    for mine in PLACEMENTS[placement]:
        table = local_of(mine)
        assert experts_of_rank(table.tolist()) == mine
        part = RankShare(mine).of(whole)
        assert part.num_experts == len(mine)
        total += reference(part, hidden, LocalExperts(table).ids(ids), weights)
    torch.testing.assert_close(total, reference(whole, hidden, ids, weights), rtol=1e-5, atol=1e-5)


def test_experts_that_stand_together_are_no_copy() -> None:
    whole = layer(Type.Q4_K)
    part = RankShare([4, 5, 6, 7]).of(whole)
    assert part.up.data.data_ptr() == whole.up.data[4].data_ptr()
    assert part.up.data.is_contiguous()


@pytest.mark.parametrize(("kind", "inter", "parts"), [(Type.Q8_0, 256, 2), (Type.Q4_K, 512, 2), (Type.F32, 96, 3)])
def test_parts_of_each_expert_add_up(kind: Type, inter: int, parts: int) -> None:
    whole, (hidden, ids, weights) = layer(kind, inter=inter), step(5)
    total = torch.zeros_like(hidden)
    for number in range(parts):
        part = RankShare(None, number, parts).of(whole)
        assert part.inter == inter // parts
        total += reference(part, hidden, ids, weights)
    torch.testing.assert_close(total, reference(whole, hidden, ids, weights), rtol=1e-4, atol=1e-4)


def test_a_bias_behind_the_sum_is_added_once() -> None:
    plain = floats(layer(Type.F32, inter=64))
    random = np.random.default_rng(0)

    def bias(rows: int) -> ExpertMatrix:
        values = torch.from_numpy(random.standard_normal((EXPERTS, rows), dtype=np.float32))
        return ExpertMatrix(values.view(torch.uint8), int(Type.F32), 1, rows)

    whole = replace(plain, form=ExpertForm(has_biases=True), biases=(bias(64), bias(64), bias(plain.hidden)))
    hidden, ids, weights = step(4)
    total = sum(reference(RankShare(None, number, 2).of(whole), hidden, ids, weights) for number in range(2))
    torch.testing.assert_close(total, reference(whole, hidden, ids, weights), rtol=1e-4, atol=1e-4)


def test_blocks_that_would_be_cut_are_refused_with_the_flag_that_works() -> None:
    share = RankShare(None, 0, 2, "--enable-expert-parallel")
    with pytest.raises(ConfigError, match=r"Q4_K, whose blocks of 256 values .* 2 parts of 128; give --enable-expert"):
        share.of(layer(Type.Q4_K, inter=256))
    with pytest.raises(ConfigError, match="width 256 cannot be cut into 3 parts; give --enable-expert-parallel"):
        RankShare(None, 0, 3, "--enable-expert-parallel").of(layer(Type.F32, inter=256))


def test_other_ranks_pairs_stay_so() -> None:
    table = local_of([2, 5])
    assert LocalExperts(table).ids(torch.tensor([[2, 5, 7], [-1, 0, 5]])).tolist() == [[0, 1, -1], [-1, -1, 1]]
    assert LocalExperts(None).ids(torch.tensor([[2, -1]], dtype=torch.int32)).tolist() == [[2, -1]]


def test_logits_are_in_this_ranks_order() -> None:
    table = torch.full((EXPERTS,), -1)
    table[[5, 2]] = torch.arange(2)
    logits = torch.arange(float(EXPERTS))[None]
    assert LocalExperts(table).columns(logits).tolist() == [[5.0, 2.0]]
    assert LocalExperts(None).columns(logits) is logits


def test_all_of_a_layer_is_itself() -> None:
    whole: LayerExperts = layer()
    assert RankShare().of(whole) is whole
