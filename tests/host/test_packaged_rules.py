"""Aliases of kTransformers' classes, and the rule files that come with the package."""

from __future__ import annotations

import importlib
import re

import pytest
import yaml
from torch import nn

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.host.hf.architectures import every_architecture
from hybrimoe_kt.host.rules import aliases
from hybrimoe_kt.host.rules.injection import (
    check_operators,
    list_packaged_rules,
    load_rules,
    match_modules,
    packaged_rules,
    unused_rules,
)
from hybrimoe_kt.host.rules.report import report_rules
from hybrimoe_kt.host.rules.rule_file import DEFAULT
from hybrimoe_kt.host.rules.skeletons import build_skeleton, skeleton_names


@pytest.fixture(scope="module")
def skeletons():
    return {name: build_skeleton(name) for name in skeleton_names()}


def served(rules: str) -> list[str]:
    """The architectures that a packaged file is for."""
    return skeleton_names() if rules == DEFAULT else [rules.removesuffix("-multi-gpu")]


def test_latent_attention_keeps_its_prefill_choice():
    kwargs = {"absorb_for_prefill": False, "generate_device": "cuda", "x": 1}
    kept, dropped = aliases.operator_kwargs("ktransformers.x.Attention", aliases.MLA, kwargs)
    assert (kept, dropped) == ({"absorb_for_prefill": False, "generate_device": "cuda"}, ["x"])
    assert aliases.operator_kwargs("ktransformers.x.Experts", aliases.EXPERTS, kwargs)[1] == ["absorb_for_prefill", "x"]


def test_every_aliased_class_exists():
    shared = [name for names in aliases.SHARED_CLASSES.values() for name in names]
    for name in [*aliases.MATCH_CLASSES.values(), *shared]:
        module, _, cls = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), cls, None), type), name


def test_legacy_spelling_is_used_only_by_patterns_that_mention_it(write, skeletons):
    file = write(
        "- {match: {name: 'layers\\.0\\.(?!.*block_sparse_moe).*$'}, replace: {kwargs: {n: 1}}}\n"
        "- {match: {name: '\\.block_sparse_moe\\.experts$'}, replace: {kwargs: {n: 2}}}\n"
        "- {match: {name: 'layers.2.mlp.experts$'}, replace: {kwargs: {n: 3}}}\n"
    )
    rules = load_rules(file)
    mixtral = match_modules(skeletons["mixtral"], rules, default_device="cpu")
    assert mixtral["model.layers.0.mlp.experts"].kwargs == {"n": 2}
    assert mixtral["model.layers.0.self_attn"].kwargs == {"n": 1}
    qwen = match_modules(skeletons["qwen3moe"], rules, default_device="cpu")
    assert qwen["model.layers.0.mlp.experts"].kwargs == {"n": 1}
    assert qwen["model.layers.2.mlp.experts"].kwargs == {"n": 3}


def test_every_architecture_has_a_rule_file_of_its_own_and_a_skeleton():
    files = list_packaged_rules()
    for family in every_architecture():
        assert packaged_rules(family.rule_file) == files[family.rule_file]
        assert family.name in skeleton_names()
    assert packaged_rules("an architecture without one") == files[DEFAULT]


# Each packaged file on what it is for, and each architecture on the file that it would get.
SERVED = sorted(
    {(name, rules) for rules in list_packaged_rules() for name in served(rules)}
    | {(family.name, family.rule_file) for family in every_architecture()}
)


@pytest.mark.parametrize(("name", "rules"), SERVED)
def test_packaged_rules_match_experts_and_latent_attention(skeletons, name, rules):
    is_default, rules, model = rules == DEFAULT, load_rules(list_packaged_rules()[rules]), skeletons[name]
    found = match_modules(model, rules, default_device="cpu")
    unused = unused_rules(rules, found)
    assert unused == [] or (is_default and rules.rules[0] not in unused), "the default's experts match in every family"
    by_class = {
        cls: [path for path, item in found.items() if item.cls == cls] for cls in (aliases.EXPERTS, aliases.MLA)
    }
    modules = dict(model.named_modules())
    assert by_class[aliases.EXPERTS] == [path for path, module in modules.items() if is_experts(module)]
    others = {"KimiLinearAttention", "BailingHybridAttention"}  # without positions, with gates
    latent = [
        path
        for path, module in modules.items()
        if hasattr(module, "kv_b_proj") and not hasattr(module, "indexer") and type(module).__name__ not in others
    ]
    assert by_class[aliases.MLA] == ([] if rules.file.endswith(f"{DEFAULT}.yaml") else latent)


def is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts")  # shared ones are an MLP to Transformers


@pytest.mark.parametrize("name", [name for name in list_packaged_rules() if not name.endswith("-multi-gpu")])
def test_options_commented_in_packaged_rules_are_real_options(name):
    text = list_packaged_rules()[name].read_text()
    options = dict(re.findall(r"^      # (\w+): (\S+)", text, re.MULTILINE))
    assert options.keys() >= {"accelerator", "cpu_backend", "cache_size", "policy", "scheduler", "prefetch_size"}
    ExpertOptions.from_kwargs({key: yaml.safe_load(value) for key, value in options.items()})


def test_packaged_rules_name_operators_that_exist(skeletons):
    pytest.importorskip("hybrimoe_kt.operators.experts", reason="the experts operator is not there yet")
    for name in list_packaged_rules():
        rules = load_rules(packaged_rules(name))
        for architecture in served(name):
            check_operators(match_modules(skeletons[architecture], rules, default_device="cpu"))


@pytest.mark.parametrize("name", [name for name in list_packaged_rules() if name.endswith("-multi-gpu")])
def test_packaged_splits_cross_once_and_leave_no_layer_out(skeletons, name):
    model = skeletons[name.removesuffix("-multi-gpu")]
    placement = report_rules(load_rules(packaged_rules(name)), model, default_device="cpu")["placement"]
    last = model.config.num_hidden_layers - 1
    middle = (last + 1) // 2 + (last + 1) % 2
    first_half, second_half = placement["route"]
    assert (first_half["device"], second_half["device"]) == ("cuda:0", "cuda:1")
    assert first_half["parts"] == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(middle))]
    assert second_half["parts"] == [*(f"model.layers.{i}" for i in range(middle, last + 1)), "model.norm", "lm_head"]
    assert placement["crossings"] == [[f"model.layers.{middle - 1}", f"model.layers.{middle}"]]
    assert placement["divided"] == []


def test_experts_are_cached_where_their_layer_lies(skeletons):
    rules = load_rules(packaged_rules("qwen3moe-multi-gpu"))
    found = match_modules(skeletons["qwen3moe"], rules, default_device="cpu")
    for number in (0, 23, 24, 47):
        devices = {found[f"model.layers.{number}{part}"].kwargs["generate_device"] for part in ("", ".mlp.experts")}
        assert devices == {"cuda:0" if number < 24 else "cuda:1"}


def test_a_layer_on_two_devices_is_told(write, skeletons):
    rules = load_rules(write("- match: {name: 'layers.1.self_attn'}\n  replace: {kwargs: {generate_device: xpu}}\n"))
    placement = report_rules(rules, skeletons["olmoe"], default_device="cpu")["placement"]
    assert placement["divided"] == ["model.layers.1"]
    assert [stage["device"] for stage in placement["route"]] == ["cpu", "cpu+xpu", "cpu"]
    assert len(placement["crossings"]) == 2


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3", "qwen2moe", "mixtral"])
def test_rules_for_the_legacy_framework_mean_the_same_here(write, skeletons, name):
    """One file serves both hosts: our operators there are our operators here, with their options."""
    file = list_packaged_rules()["deepseek2"].parent / "legacy" / f"{name}.yaml"
    rules = load_rules(file)
    found = match_modules(skeletons[name], rules, default_device="cpu")
    check_operators(found)
    experts = {path for path, item in found.items() if item.cls == aliases.EXPERTS}
    packaged = match_modules(skeletons[name], load_rules(packaged_rules(name.replace("3", "2"))), default_device="cpu")
    assert experts == {path for path, item in packaged.items() if item.cls == aliases.EXPERTS}
    blocks = {path.removesuffix(".experts") for path in experts}
    assert {item.rule.replace_class.rpartition(".")[0] for path, item in found.items() if path in blocks} == {
        "hybrimoe_kt.host.kt.blocks"
    }
    text = file.read_text().replace("out_device: cuda", "out_device: cuda\n      cache_size: 25%")
    found = match_modules(skeletons[name], load_rules(write(text)), default_device="cpu")
    assert all(found[path].kwargs["cache_size"] == "25%" for path in experts)


def test_modules_without_weights_are_on_no_device(write, skeletons):
    """A layer itself and its MLP hold nothing: that no rule names them divides no layer."""
    rules = load_rules(
        write("- match: {name: '^model\\.layers\\.1\\.'}\n  replace: {kwargs: {generate_device: xpu}}\n")
    )
    placement = report_rules(rules, skeletons["qwen3moe"], default_device="cpu")["placement"]
    assert placement["divided"] == []
    assert [stage["device"] for stage in placement["route"]] == ["cpu", "xpu", "cpu"]


@pytest.mark.parametrize(
    "name", ["attention.KQwen3MoeAttention", "experts.KQwen3MoeSparseMoeBlock", "models.KQwen3MoeModel"]
)
def test_operators_of_qwen3_moe_leave_the_stock_module(name):
    assert aliases.operator_class(f"ktransformers.operators.{name}") == aliases.STOCK
