"""Our rule engine decides and replaces exactly as kTransformers' own.

Two oracles: upstream's engine itself when its source is at hand, and a few independent lines that always run.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hybrimoe_kt.host.hf.architectures import ARCHITECTURES
from hybrimoe_kt.host.rules import aliases
from hybrimoe_kt.host.rules.injection import inject, list_packaged_rules, load_rules, match_modules, unused_rules
from hybrimoe_kt.host.rules.skeletons import build_skeleton

_spec = importlib.util.spec_from_file_location(
    "legacy_ktransformers", Path(__file__).with_name("legacy_ktransformers.py")
)
legacy_ktransformers = sys.modules["legacy_ktransformers"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(legacy_ktransformers)

DEVICE = "cuda:0"  # 0.2.1 forgets to pass another default device on to children


@pytest.fixture(scope="module")
def legacy():
    root = legacy_ktransformers.find()
    if root is None:
        pytest.skip(legacy_ktransformers.MISSING)
    return legacy_ktransformers.load(root)


# ---------------------------------------------------------------- random trees and rules


class Recorder(nn.Module):
    """An operator that writes down how it was constructed."""

    built: list = []  # noqa: RUF012 - emptied by every run

    def __init__(self, key, gguf_loader, config, orig_module, **kwargs):
        super().__init__()
        object.__setattr__(self, "orig_module", orig_module)
        self.built.append((type(self).__name__, key, type(orig_module).__name__, kwargs))


class Other(Recorder):
    pass


class Block(nn.Module):
    pass


class Special(Block):
    pass


@pytest.fixture(scope="module", autouse=True)
def importable():
    module = types.ModuleType("rule_conformance")
    vars(module).update(Recorder=Recorder, Other=Other, Block=Block, Special=Special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rule_conformance", module)
        yield


NAMES = ("layers", "mlp", "experts", "attn", "gate", "norm", "0", "1")
PIECES = ("layers", "mlp", r"\.", "^", "$", "experts", "[01]", ".*", r"(?!.*gate)", "attn|norm", "", r"\d+\.mlp$")
MATCH_CLASSES = ("torch.nn.Linear", "torch.nn.Module", "rule_conformance.Block", "rule_conformance.Special")
OPERATORS = ("default", "rule_conformance.Recorder", "rule_conformance.Other")


def make_tree(shape) -> nn.Module:
    if isinstance(shape, str):
        return {"linear": lambda: nn.Linear(1, 1), "relu": nn.ReLU, "block": Block}[shape]()
    special, children = shape
    module = Special() if special else Block()
    for name, child in children.items():
        module.register_module(name, None if child is None else make_tree(child))
    return module


leaves = st.one_of(st.none(), st.sampled_from(("linear", "relu", "block")))
shapes = st.recursive(
    leaves,
    lambda child: st.tuples(st.booleans(), st.dictionaries(st.sampled_from(NAMES), child, max_size=4)),
    max_leaves=12,
)
trees = st.tuples(st.booleans(), st.dictionaries(st.sampled_from(NAMES), shapes, max_size=4))


@st.composite
def rule_lists(draw) -> list[dict]:
    pattern = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)
    kwargs = st.dictionaries(st.sampled_from(("size", "generate_device")), st.one_of(st.integers(0, 3), st.just([1])))
    rules = []
    for _ in range(draw(st.integers(0, 5))):
        match = {"name": draw(pattern), "class": draw(st.sampled_from(MATCH_CLASSES))}
        match = {key: match[key] for key in draw(st.sampled_from((("name",), ("class",), ("name", "class"))))}
        replace = draw(st.fixed_dictionaries({}, optional={"class": st.sampled_from(OPERATORS), "kwargs": kwargs}))
        rule = {"match": match, "replace": replace}
        if draw(st.booleans()):
            rule["recursive"] = draw(st.booleans())
        rules.append(rule)
    return rules


def as_rules(folder: Path, rules: list[dict]):
    file = folder / "rules.yaml"
    file.write_text(yaml.safe_dump(rules))
    return load_rules(file)


def ours(model: nn.Module, rules, onto=None) -> dict:
    return match_modules(model, rules, default_device=DEVICE, onto=onto)


def plain(found: dict) -> dict:
    return {path: (item.cls, item.kwargs) for path, item in found.items()}


def oracle(model: nn.Module, rules: list[dict]) -> dict:
    """The grammar once more, in other words: walk a work list, ask each rule for a verdict."""

    def wants(rule: dict, path: str, module: nn.Module) -> bool:
        name, cls = rule["match"].get("name"), rule["match"].get("class", "torch.nn.Module")
        home, _, attribute = cls.rpartition(".")
        if not isinstance(module, getattr(importlib.import_module(home), attribute)):
            return False
        return name is None or re.search(name, path) is not None

    decided, work = {}, [("", model)]
    while work:
        path, module = work.pop(0)
        rule = next((rule for rule in rules if wants(rule, path, module)), None)
        devices = {"generate_device": DEVICE, "prefill_device": DEVICE}
        replace = rule["replace"] if rule else {"kwargs": devices}
        decided[path] = (replace.get("class", "default"), replace.get("kwargs", {}))
        if rule is None or rule.get("recursive", True):
            work += [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
    return decided


def upstream(legacy, model: nn.Module, *rule_lists: list[dict]) -> dict:
    out: dict = {}
    for rules in rule_lists:
        legacy.gen_optimize_config(model, out, rules, default_device=DEVICE)
    return out


many = settings(max_examples=120, deadline=None, database=None)


@many
@given(shape=trees, rules=rule_lists())
def test_decides_like_the_independent_oracle(tmp_path_factory, shape, rules):
    model = make_tree(shape)
    assert plain(ours(model, as_rules(tmp_path_factory.getbasetemp(), rules))) == oracle(model, rules)


@many
@given(shape=trees, rules=rule_lists(), more=rule_lists())
def test_decides_like_upstream(tmp_path_factory, legacy, shape, rules, more):
    model, folder = make_tree(shape), tmp_path_factory.getbasetemp()
    theirs = upstream(legacy, model, rules)
    found = ours(model, as_rules(folder, rules))
    assert list(plain(found).items()) == [(path, (item["class"], item["kwargs"])) for path, item in theirs.items()]
    assert all(item["key"] == path for path, item in theirs.items())
    both = ours(model, as_rules(folder, more), onto=found)
    theirs = upstream(legacy, model, rules, more)
    assert plain(both) == {path: (item["class"], item["kwargs"]) for path, item in theirs.items()}


@many
@given(shape=trees, rules=rule_lists())
def test_replaces_like_upstream(tmp_path_factory, legacy, shape, rules):
    model, other = make_tree(shape), make_tree(shape)
    loader, theirs = types.SimpleNamespace(tensor_device_map={}), types.SimpleNamespace(tensor_device_map={})
    Recorder.built.clear()
    found = ours(model, as_rules(tmp_path_factory.getbasetemp(), rules))
    inject(model, found, gguf_loader=loader, config=None)
    built = copy.copy(Recorder.built)
    Recorder.built.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        legacy.inject(other, upstream(legacy, other, rules), None, theirs)
    assert built == Recorder.built
    assert loader.tensor_device_map == theirs.tensor_device_map
    assert nested(model) == nested(other)


def nested(module: nn.Module) -> tuple:
    """Return class names, through operators into the modules they replaced."""
    module_below = getattr(module, "orig_module", module)
    below = {name: child and nested(child) for name, child in module_below._modules.items()}
    return type(module).__name__, type(module_below).__name__, below


# ---------------------------------------------------------------- upstream's own rule files


# Every rule file of release 0.2.1 but Internlm's, which has no experts, and one of a later release.
RULE_FILES = {
    "DeepSeek-V2-Chat": "deepseek2",
    "DeepSeek-V2-Chat-multi-gpu": "deepseek2",
    "DeepSeek-V2-Chat-multi-gpu-4": "deepseek2",
    "DeepSeek-V2-Lite-Chat": "deepseek2",
    "DeepSeek-V2-Lite-Chat-multi-gpu": "deepseek2",
    "DeepSeek-V3-Chat": "deepseek3",
    "DeepSeek-V3-Chat-multi-gpu": "deepseek3",
    "DeepSeek-V3-Chat-multi-gpu-4": "deepseek3",
    "DeepSeek-V3-Chat-multi-gpu-8": "deepseek3",
    "DeepSeek-V3-Chat-multi-gpu-marlin": "deepseek3",
    "Qwen2-57B-A14B-Instruct": "qwen2moe",
    "Qwen2-57B-A14B-Instruct-multi-gpu": "qwen2moe",
    "Mixtral": "mixtral",
    "Qwen3Moe-serve": "qwen3moe",
}
# Rules for modules that Transformers 5 has no longer: one rotary module per model instead of one per layer, and no
# dense MLP in a Qwen3-MoE whose layers are all sparse.
GONE = re.compile(r"RotaryEmbedding|Qwen3MoeMLP")
# Rules that match nothing in upstream's engine either: they name a layer and ask for a Linear.
DEAD = {"Qwen2-57B-A14B-Instruct-multi-gpu"}


def released_model(name: str) -> nn.Module:
    """The skeleton for a rule file; DeepSeek-V2's own split counts to 60 layers, the skeleton is V2-Lite's."""
    if not name.startswith("DeepSeek-V2-Chat"):
        return build_skeleton(RULE_FILES[name])
    values = ARCHITECTURES["deepseek2"].skeleton | {"num_hidden_layers": 60}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(ARCHITECTURES["deepseek2"].model_type, **values))


@pytest.fixture
def modelling_stand_ins(monkeypatch):
    """Let upstream's engine import `ktransformers.models.modeling_X`: the classes are those of Transformers."""
    for name in ("ktransformers", "ktransformers.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for short in aliases.MATCH_CLASSES:
        name, _, cls = f"ktransformers.models.{short}".rpartition(".")
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        classes = [
            getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
            for path in aliases.match_class(f"{name}.{cls}")
        ]
        setattr(sys.modules[name], cls, classes[0] if len(classes) == 1 else tuple(classes))


def legacy_layout(model: nn.Module) -> nn.Module:
    """Give a Mixtral its legacy module names back."""
    for layer in model.model.layers if model.config.model_type == "mixtral" else ():
        layer._modules = {{"mlp": "block_sparse_moe"}.get(k, k): v for k, v in layer._modules.items()}
    return model


@pytest.mark.parametrize("name", RULE_FILES)
def test_legacy_rule_file_matches_the_same_modules(legacy, modelling_stand_ins, name):
    file = legacy.rules / f"{name}.yaml"
    if not file.is_file():
        pytest.skip(f"{file.name} is not in this release; point HYBRIMOE_KTRANSFORMERS at a later one")
    model = released_model(name)
    rules = load_rules(file)
    found = ours(model, rules)
    theirs = upstream(legacy, legacy_layout(model), yaml.safe_load(file.read_text()))
    modern = {path.replace("block_sparse_moe", "mlp"): item for path, item in theirs.items()}
    assert list(found) == list(modern)
    for path, item in modern.items():
        assert found[path].cls == aliases.operator_class(item["class"]), path
        assert found[path].kwargs.items() <= item["kwargs"].items(), path
    for rule in unused_rules(rules, found):
        dead = name in DEAD and rule.name.pattern.endswith("$") and rule.cls == "torch.nn.Linear"
        assert dead or GONE.search(rule.cls or ""), f"line {rule.line} matches nothing"


@pytest.mark.parametrize("name", [name for name in RULE_FILES if not name.endswith("multi-gpu")])
def test_legacy_rule_file_reaches_experts_blocks_and_linears(legacy, name):
    file = legacy.rules / f"{name}.yaml"
    if not file.is_file():
        pytest.skip(f"{file.name} is not in this release; point HYBRIMOE_KTRANSFORMERS at a later one")
    model = build_skeleton(RULE_FILES[name])
    found = ours(model, load_rules(file))
    written = {path: item.rule.replace_class.rpartition(".")[2] for path, item in found.items() if item.rule}
    paths = dict(model.named_modules())
    experts = [path for path in paths if path.endswith(".mlp.experts")]
    assert experts
    assert all(re.fullmatch("KTransformersExperts(V2)?", written[path]) for path in experts)
    assert all("M" in written[path.removesuffix(".experts")] for path in experts), "the MoE block has its operator"
    kept_plain = re.compile(r"kv_b_proj|shared_expert_gate|lm_head")
    linears = [p for p, m in paths.items() if isinstance(m, nn.Linear) and not kept_plain.search(p)]
    assert {written[path] for path in linears} == {"KTransformersLinear"}
    assert ("KDeepseekV2Attention" in written.values()) == name.startswith("DeepSeek")


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3", "qwen2moe", "mixtral"])
def test_our_rule_files_for_the_legacy_framework_mean_the_same_to_it(legacy, modelling_stand_ins, name):
    file = list_packaged_rules()["deepseek2"].parent / "legacy" / f"{name}.yaml"
    model = build_skeleton(name)
    found = ours(model, load_rules(file))
    theirs = upstream(legacy, legacy_layout(model), yaml.safe_load(file.read_text()))
    modern = {path.replace("block_sparse_moe", "mlp"): item for path, item in theirs.items()}
    assert list(found) == list(modern)
    for path, item in modern.items():
        assert found[path].cls == aliases.operator_class(item["class"]), path
    written = {item["class"].rpartition(".")[2] for item in modern.values()}
    assert "HybriMoEExperts" in written
    assert any(cls.startswith("HybriMoE") and cls.endswith("Block") for cls in written)
