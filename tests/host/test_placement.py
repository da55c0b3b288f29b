"""Dense layers over several devices: where rules put them, and what crosses between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from hybrimoe_kt.errors import RuleError
from hybrimoe_kt.host.hf.placement import Crossings, Placement, place_modules
from hybrimoe_kt.host.rules import injection as rule_engine

RULE = """
- match:
    name: {}
  replace:
    kwargs: {{generate_device: "{}", prefill_device: "{}"}}
"""
FIRST_HALF = r"^model\.embed_tokens$|^model\.rotary_emb$|^model\.layers\.[01](\.|$)"
SECOND_HALF = r"^model\.layers\.\d|^model\.norm$|^lm_head$"


def qwen(**changes: object) -> torch.nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="batched_mm"
    ).eval()


def placed(model: torch.nn.Module, tmp_path: Path, *rules: tuple[str, str], default: str = "cpu") -> Placement:
    file = tmp_path / "rules.yaml"
    file.write_text("".join(RULE.format(name, device, device) for name, device in rules))
    injections = rule_engine.match_modules(model, rule_engine.load_rules(file), default_device=default)
    return place_modules(model, injections, default)[0]


def halves(model: torch.nn.Module, tmp_path: Path) -> Placement:
    return placed(model, tmp_path, (FIRST_HALF, "emulated:0"), (SECOND_HALF, "emulated:1"))


def test_the_cpu_is_not_an_emulated_accelerator(tmp_path: Path) -> None:
    placement = placed(qwen(), tmp_path, (r"^model\.layers\.1(\.|$)", "cpu"), default="emulated:0")
    assert placement.places["model.layers.1"] == "cpu"
    assert placement.places["model.layers.0"] == placement.default == "emulated:0"


def test_rules_place_whole_layers(tmp_path: Path) -> None:
    placement = halves(qwen(), tmp_path)
    assert placement.places == {
        "model.embed_tokens": "emulated:0",
        "model.layers.0": "emulated:0",
        "model.layers.1": "emulated:0",
        "model.layers.2": "emulated:1",
        "model.layers.3": "emulated:1",
        "model.norm": "emulated:1",
        "model.rotary_emb": "emulated:0",
        "lm_head": "emulated:1",
    }
    assert placement.is_split
    assert placement.device_map == {"": "cpu"}, "emulated accelerators compute in the host's memory"


def test_no_rule_leaves_all_on_the_default(tmp_path: Path) -> None:
    placement = placed(qwen(), tmp_path, ("^nothing$", "emulated:0"))
    assert set(placement.places.values()) == {"cpu"} and not placement.is_split


def test_a_layer_is_not_divided(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"model\.layers\.2 would be divided between emulated:1 and cpu") as caught:
        placed(qwen(), tmp_path, (r"layers\.2\.self_attn\.q_proj$", "emulated:1"))
    assert caught.value.line == 2


def test_tied_weights_stand_once(tmp_path: Path) -> None:
    model = qwen(tie_word_embeddings=True)
    assert halves(model, tmp_path).places["lm_head"] == "emulated:0"


def test_a_device_that_is_not_there_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(RULE.format(SECOND_HALF, "xpu:7", "xpu:7"))
    model = qwen()
    injections = rule_engine.match_modules(model, rule_engine.load_rules(file), default_device="cpu")
    placement, lacking = place_modules(model, injections, "cpu")
    assert not placement.is_split
    assert lacking is not None and lacking.rule is not None and lacking.rule.number == 1


def test_hidden_states_cross_once_per_boundary_and_step(tmp_path: Path) -> None:
    model = qwen()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        wanted = model(ids).logits
        crossings = Crossings(model, halves(model, tmp_path))
        assert torch.equal(model(ids).logits, wanted)
        assert crossings.num_crossings == 1
        model(ids[:, :1])
    assert crossings.num_crossings == 2


class _Copies(TorchDispatchMode):
    """Notes the size of every tensor that goes from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.sizes.append(tuple(out.shape))
        return out


def test_each_tensor_crosses_once(tmp_path: Path) -> None:
    """The second half on a device that computes nothing: what reaches it is counted on the way."""
    model = qwen()
    places = {
        path: "meta" if place == "emulated:1" else "cpu" for path, place in halves(model, tmp_path).places.items()
    }
    for path, place in places.items():
        model.get_submodule(path).to(place)
    Crossings(model, Placement(places, "cpu"))
    copies = _Copies()
    with torch.no_grad(), copies:
        logits = model(torch.arange(12)[None], use_cache=False).logits
    assert logits.device.type == "meta" and logits.shape == (1, 12, 64)
    hidden, angles = (1, 12, 32), (1, 12, 16)
    assert copies.sizes.count(hidden) == 1
    assert copies.sizes.count(angles) == 2, "cosine and sine, for both layers together"
    assert len(copies.sizes) <= 4, copies.sizes
