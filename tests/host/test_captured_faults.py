"""Captured steps on a device that works in any order, fails, or has less memory: the tokens stay what they were."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_kt.device.emulated.adversarial import AdversarialAccelerator
from hybrimoe_kt.device.emulated.adversary import Adversary
from hybrimoe_kt.device.emulated.faults import Faults
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.host.rules.injection import packaged_rules
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.runtime import ModelExperts, Runtime, assemble
from tests.support.captured_steps import PROMPT, Make, decode, generator, load

from .test_equality import SHAPES

pytestmark = pytest.mark.usefixtures("little_room", "one_thread")


def on_adversary(seed: int, faults: Faults | None = None) -> Callable[[ModelExperts], Runtime]:
    def made(experts: ModelExperts) -> Runtime:
        accelerator = AdversarialAccelerator(Adversary(seed), faults=faults)
        return assemble(experts, accelerators={"emulated": accelerator})

    return made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cache_size", [1, 0.5, "all"])
def test_in_whatever_order_a_device_works(generated: Make, seed: int, cache_size: Any) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model, cache_size=cache_size), captures=False), 16)
    loaded = load(model, cache_size=cache_size, prefetch_size=3, assemble=on_adversary(seed))
    assert torch.equal(decode(generator(loaded, captures=True), 16), wanted)
    adversary = loaded.runtime.accelerators[0].adversary  # type: ignore[attr-defined]
    assert not adversary.detector.races


@pytest.mark.parametrize("failure", ["raise", "late", "stall", "out_of_memory"])
@pytest.mark.parametrize(
    ("kind", "at"), [("copy", 50), ("copy", 60), ("copy", 97), ("copy", 130), ("launch", 40), ("launch", 75)]
)
def test_faults_change_nothing(generated: Make, kind: str, at: int, failure: Any) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=False), 16)
    faults = Faults(kind, at, failure, times=2)
    loaded = load(model, deadline_s=0.3, assemble=on_adversary(1, faults))
    made = generator(loaded, captures=True)
    found = decode(made, 16)
    assert faults.site is not None, "it struck"
    if failure in ("late", "stall"):  # the host had gone on: everything was computed anew, as one prompt
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    else:
        assert torch.equal(found, wanted)


def test_slots_that_are_taken_away_between_two_tokens(generated: Make) -> None:
    """A whole layer is not whole any more, and a captured launch reads memory that is gone."""
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=False), 16)
    for size in ("all", 0.5):
        made = generator(load(model, cache_size=size), captures=True)
        rows = decode(made, 8)
        assert made.runtime.make_room(torch.OutOfMemoryError("asked for"))
        more = decode(made, 7, [int(rows[-1].argmax())])
        assert torch.equal(torch.cat([rows, more]), wanted)


@pytest.mark.parametrize("through", ["prompt", "nothing"])
def test_experts_that_change_places_between_two_tokens(generated: Make, through: str) -> None:
    """As after a failure in a prompt: the layer is whole again, and the table of slots that was captured is not."""
    model = generated(SHAPES["qwen3moe"])
    later = PROMPT if through == "prompt" else [7]
    wanted = generator(load(model), captures=False)
    rows = torch.cat([decode(wanted, 8), decode(wanted, 8, later)])
    made = generator(load(model, cache_size="all"), captures=True)
    found = decode(made, 8)
    runtime = made.runtime
    lane, coordinator = runtime.lanes[0], runtime.coordinator
    layer = min(runtime.store.layers)
    a, b = coordinator.slots_of(layer)[0], coordinator.slots_of(layer)[1]
    for slot in (a, b):
        coordinator.drop(layer, slot)
    cache, memory = coordinator._layers[layer].cache, lane.pool.layers[layer].memory
    for expert, slot in ((0, b), (1, a)):
        cache.prepare(expert, slot, 0.0)
        cache.complete(expert)
    memory[[a, b]] = memory[[b, a]]
    assert torch.equal(torch.cat([found, decode(made, 8, later)]), rows)


def test_an_error_in_a_captured_step_leaves_the_next_one_right(generated: Make) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]))
    wanted = decode(generator(loaded, captures=False), 8)
    made = generator(loaded, captures=True)
    handle = loaded.model.model.layers[1].register_forward_pre_hook(_fail_second())
    with pytest.raises(ZeroDivisionError):
        decode(made, 8)
    handle.remove()
    made.reset()
    assert torch.equal(decode(made, 8), wanted)


@pytest.mark.parametrize("where", ["layers.0.self_attn", "layers.1.self_attn.v_proj"])
def test_a_prompt_that_breaks_leaves_nothing_in_memory(generated: Make, tmp_path: Path, where: str) -> None:
    """Nor layers of unequal room: Transformers' own attention is given all of it, behind a mask."""
    packaged = Path(packaged_rules("qwen3moe.yaml")).read_text()
    rules = tmp_path / "rules.yaml"
    rules.write_text(re.sub(r"- match:\n    name: \^model.*self_attn\$\n.*\n.*DecodeAttention\n", "", packaged))
    loaded = load(generated(SHAPES["qwen3moe"]), rules_path=rules)
    assert not any(isinstance(module, DecodeAttention) for module in loaded.model.modules())
    made = generator(loaded, captures=True)
    wanted = decode(made, 4)
    body: Any = loaded.model
    hook = body.model.get_submodule(where).register_forward_hook(lambda _, args, answer: _without_numbers(answer))
    with pytest.raises(KernelError, match="NaN"):
        made.append([3, *PROMPT, *PROMPT, 4])
    hook.remove()
    made.reset()
    assert torch.equal(decode(made, 4), wanted)


def _without_numbers(answer: Any) -> Any:
    return (answer[0] * math.nan, *answer[1:]) if isinstance(answer, tuple) else answer * math.nan


def _fail_second() -> Callable[..., None]:
    """Of the steps of one token: the first is an ordinary one, the second is captured."""
    calls: list[int] = []

    def hook(module: Any, args: Any) -> None:
        calls.append(args[0].shape[1])
        if calls.count(1) == 2:
            raise ZeroDivisionError

    return hook
