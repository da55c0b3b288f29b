"""Reading rule files, matching, injecting; every complaint is one sentence with its line."""

from __future__ import annotations

import contextlib
import logging
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybrimoe_kt.errors import ConfigError, RuleError
from hybrimoe_kt.host.rules.injection import inject, load_rules, match_modules, unused_rules

HERE = __name__


class Operator(nn.Module):
    """Accepts the contract and two options; remembers what it was given and where it was built."""

    def __init__(self, key, gguf_loader, config, orig_module, generate_device="cpu", size=1):
        super().__init__()
        self.given = {"key": key, "generate_device": generate_device, "size": size}
        object.__setattr__(self, "orig_module", orig_module)
        self.device = torch.empty(1).device.type


class PickyOperator(nn.Module):
    def __init__(self, key, gguf_loader, config, orig_module, **kwargs):
        super().__init__()
        raise ConfigError("size is 0, valid: from 1")

    @classmethod
    def check_kwargs(cls, kwargs):
        if "colour" in kwargs:
            raise ConfigError("unknown option 'colour'")


class NeedyOperator(nn.Module):
    def __init__(self, key, gguf_loader, config, orig_module, colour):
        super().__init__()


class NotAModule:
    def __init__(self, key, gguf_loader, config, orig_module):
        pass


not_a_class = 3


class Loader:
    def __init__(self):
        self.tensor_device_map = {}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Make this file's operators nameable in rules, however pytest imported it."""
    monkeypatch.setitem(sys.modules, "rule_operators", sys.modules[HERE])


def tree() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(2, 2)
    model.layers = nn.ModuleList()
    for _ in range(2):
        layer = nn.Module()
        layer.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        layer.norm = None
        model.layers.append(layer)
    return model


# ---------------------------------------------------------------- reading

GOOD = """\
# comment
- match:
    name: "^a$"
  replace:
    class: rule_operators.Operator
    kwargs:
      # size: 3
- match: {class: torch.nn.Linear}
  replace: {}
  recursive: False
"""


def test_reads_rules_with_their_lines(write):
    rules = load_rules(write(GOOD)).rules
    assert [(rule.number, rule.line, rule.cls, rule.replace_class, rule.recursive) for rule in rules] == [
        (1, 2, None, "rule_operators.Operator", True),
        (2, 8, "torch.nn.Linear", "default", False),
    ]
    assert rules[0].name.pattern == "^a$"
    assert rules[0].kwargs == {} == rules[1].kwargs


def test_anchors_and_merges_are_plain_yaml(write):
    file = write(
        "- match: {name: a}\n  replace: &r\n    class: default\n    kwargs: {x: 1}\n"
        "- match: {name: b}\n  replace:\n    <<: *r\n    kwargs: {x: 2}\n- match: {name: c}\n  replace: *r\n"
    )
    assert [rule.kwargs["x"] for rule in load_rules(file).rules] == [1, 2, 1]


BAD_FILES = {
    "empty": ("", None, "holds nothing"),
    "mapping": ("match: {name: a}\n", 1, "holds a mapping"),
    "scalar": ("hello\n", 1, "holds a single value"),
    "not yaml": ("- match: {name: 'a}\n", 2, "not valid YAML"),
    "tab": ("- match:\n\t name: a\n", 2, "not valid YAML"),
    "control character": ("- match: \x00\n", None, "not valid YAML"),
    "python object": ("- match: {name: a}\n  replace: {kwargs: !!python/object/apply:os.getcwd []}\n", 2, "YAML"),
    "merge of a number": ("- match: {name: a}\n  replace: {<<: 3}\n", 2, "not valid YAML"),
    "no date": ("- match: {name: a}\n  replace:\n    kwargs: {d: 2001-99-99}\n", 3, "not valid YAML: month must be"),
    "deep": ("[" * 1200, None, "nests too deeply"),
    "deep kwargs": (f"- match: {{name: a}}\n  replace:\n    kwargs: {'{a: ' * 400}1{'}' * 400}\n", 3, "too deeply"),
    "rule no mapping": ("- hello\n", 1, "'rule' must be a mapping"),
    "no match": ("- replace: {class: default}\n", 1, "'match' is missing"),
    "no replace": ("# x\n- match: {name: a}\n", 2, "'replace' is missing"),
    "empty match": ("- match: {}\n  replace: {}\n", 1, "at least one of 'name' and 'class'"),
    "null match": ("- match:\n  replace: {}\n", 1, "'match' must be a mapping"),
    "null replace": ("- match: {name: a}\n  replace:\n", 2, "'replace' must be a mapping"),
    "unknown rule key": ("- match: {name: a}\n  replace: {}\n  recursiv: false\n", 3, "did you mean 'recursive'?"),
    "unknown match key": ("- match: {nam: a}\n  replace: {}\n", 1, "did you mean 'name'?"),
    "unknown replace key": ("- match: {name: a}\n  replace:\n    kwarg: {}\n", 3, "did you mean 'kwargs'?"),
    "far unknown key": ("- match: {name: a}\n  replace:\n    zzz: {}\n", 3, "valid: class, kwargs"),
    "forgotten dash": ("- match: {name: a}\n  replace: {}\n  match: {name: b}\n", 3, "is a '-' missing"),
    "bad regex": ("- match:\n    name: '(a'\n  replace: {}\n", 2, "is not a regular expression"),
    "regex no text": ("- match: {name: 3}\n  replace: {}\n", 1, "regular expression in quotes"),
    "class no text": ("- match: {class: 3}\n  replace: {}\n", 1, "match.class must be text"),
    "replace class empty": ("- match: {name: a}\n  replace: {class: ''}\n", 2, "replace.class must be text"),
    "kwargs list": ("- match: {name: a}\n  replace:\n    kwargs: [1]\n", 3, "must be a mapping of options"),
    "kwargs number key": ("- match: {name: a}\n  replace:\n    kwargs: {1: 2}\n", 3, "option names are text"),
    "recursive text": ("- match: {name: a}\n  replace: {}\n  recursive: 'no'\n", 3, "must be true or false"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_sentence_with_its_line(write, case):
    text, line, sentence = BAD_FILES[case]
    file = write(text)
    with pytest.raises(RuleError, match=re.escape(sentence)) as caught:
        load_rules(file)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert "\n" not in str(caught.value)


PIECES = (
    "- ",
    "match",
    "replace",
    "class",
    "name",
    "kwargs",
    "recursive",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "\n",
    "  ",
    "a",
    "(",
)
PIECES += (
    "&x ",
    "*x",
    "<<",
    "'",
    '"',
    "!!int ",
    "!!binary ",
    "? ",
    "| ",
    "1",
    "0x_",
    "false",
    "#",
    "\t",
    ",",
    "é",
    "\x07",
)


@settings(max_examples=300, deadline=None, database=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_whatever_is_in_the_file_it_is_rules_or_a_rule_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(text, encoding="utf-8")
    with contextlib.suppress(RuleError):
        load_rules(file)


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("- é".encode("latin-1"))
    for name, sentence in (("none.yaml", "does not exist"), ("latin.yaml", "not UTF-8"), ("", "cannot be read")):
        with pytest.raises(RuleError, match=sentence):
            load_rules(tmp_path / name)


# ---------------------------------------------------------------- matching


def test_unmatched_modules_get_the_default_device(write):
    found = match_modules(tree(), load_rules(write("[]")), default_device="cuda:1")
    assert list(found)[:3] == ["", "embed", "layers"]
    assert "layers.0.norm" not in found
    assert {item.cls for item in found.values()} == {"default"}
    assert found["layers.1.mlp.0"].kwargs == {"generate_device": "cuda:1", "prefill_device": "cuda:1"}


def test_first_match_wins_and_stops_descent_even_for_default(write):
    file = write(
        "- {match: {name: 'layers.0.mlp$'}, replace: {class: default, kwargs: {k: [1]}}, recursive: false}\n"
        "- {match: {name: mlp}, replace: {class: rule_operators.Operator, kwargs: {size: 2}}}\n"
        "- {match: {name: mlp, class: torch.nn.Linear}, replace: {class: rule_operators.NotAModule}}\n"
    )
    rules = load_rules(file)
    found = match_modules(tree(), rules, default_device="cpu")
    assert [path for path, item in found.items() if item.rule] == [
        "layers.0.mlp",
        "layers.1.mlp",
        "layers.1.mlp.0",
        "layers.1.mlp.1",
    ]
    found["layers.1.mlp"].kwargs["size"] = 7
    assert rules.rules[1].kwargs == {"size": 2} == found["layers.1.mlp.0"].kwargs
    assert [(rule.number, rule.line) for rule in unused_rules(rules, found)] == [(3, 3)]


def test_a_second_file_merges_kwargs_and_keeps_the_class(write):
    first = load_rules(write("- {match: {name: embed}, replace: {class: rule_operators.Operator, kwargs: {size: 2}}}"))
    found = match_modules(tree(), first, default_device="cpu")
    second = load_rules(
        write("- {match: {name: 'embed|0.mlp$'}, replace: {class: a.b, kwargs: {generate_device: cuda}}}")
    )
    merged = match_modules(tree(), second, default_device="meta", onto=found)
    assert (merged["embed"].cls, merged["embed"].kwargs) == (
        "rule_operators.Operator",
        {"size": 2, "generate_device": "cuda"},
    )
    assert merged["layers.0.mlp"].cls == "a.b"
    assert merged["layers.1"].kwargs["generate_device"] == "cpu"


BAD_CLASSES = {
    "Linear": "not a dotted path",
    "torch.nn.Linea": "did you mean 'Linear'?",
    "no_such_package.X": "cannot be imported",
    "torch..nn.X": "cannot be imported",
    ".X": "not a dotted path",
    "rule_operators.not_a_class": "is not a class",
    "ktransformers.models.modeling_qwen3_moe.Qwen3MoeSparseMoeBlok": "Qwen3MoeSparseMoeBlock'?",
}


@pytest.mark.parametrize("name", BAD_CLASSES)
def test_unknown_match_class(write, name):
    rules = load_rules(write(f"[]\n\n- match: {{class: '{name}'}}\n  replace: {{}}\n".removeprefix("[]\n")))
    with pytest.raises(RuleError, match=re.escape(BAD_CLASSES[name])) as caught:
        match_modules(tree(), rules, default_device="cpu")
    assert (caught.value.line, caught.value.key) == (2, "match.class")


# ---------------------------------------------------------------- injecting


def injections(write, cls: str, kwargs: str = "{}", name: str = "mlp$"):
    rules = load_rules(write(f"- match: {{name: '{name}'}}\n  replace: {{class: {cls}, kwargs: {kwargs}}}\n"))
    model = tree()
    return model, match_modules(model, rules, default_device="cpu")


def test_injects_parents_and_the_children_of_the_original(write):
    model, found = injections(write, "rule_operators.Operator", "{size: 3}", name="mlp")
    original, linear, loader = model.layers[0].mlp, model.layers[0].mlp[0], Loader()
    made = inject(model, found, gguf_loader=loader, config=None)
    assert [item.path for item, _ in made] == [
        path for i in (0, 1) for path in (f"layers.{i}.mlp", f"layers.{i}.mlp.0", f"layers.{i}.mlp.1")
    ]
    operator = model.layers[0].mlp
    assert operator.given == {"key": "layers.0.mlp", "generate_device": "cpu", "size": 3}
    assert operator.orig_module is original
    assert original[0].orig_module is linear
    assert operator.device == "meta"
    assert loader.tensor_device_map["layers.0.mlp"] == {"size": 3}
    assert loader.tensor_device_map["embed"]["generate_device"] == "cpu"
    assert "" not in loader.tensor_device_map


@pytest.mark.parametrize("code", ["x = (", "1 / 0", "raise RuntimeError", "import no_such_package"])
def test_a_module_that_fails_on_import_is_named_with_its_rule(write, tmp_path, monkeypatch, code):
    (tmp_path / "broken_operator.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model, found = injections(write, "broken_operator.Operator")
    with pytest.raises(RuleError, match=r"rule 1: replace\.class 'broken_operator\.Operator' cannot be imported: \S"):
        inject(model, found, gguf_loader=None, config=None)


def test_construct_builds_the_operator(write):
    model, found = injections(write, "rule_operators.Operator", "{size: 3}")
    seen = []

    def construct(cls, **kwargs):
        seen.append((cls.__name__, sorted(kwargs)))
        return cls(**kwargs)

    inject(model, found, gguf_loader=None, config=None, construct=construct)
    assert seen == [("Operator", ["config", "gguf_loader", "key", "orig_module", "size"])] * 2


BAD_OPERATORS = {
    ("rule_operators.Operatr", "{}"): "did you mean 'Operator'?",
    ("rule_operators.Operator", "{siz: 1}"): "has no option 'siz', did you mean 'size'?",
    ("rule_operators.Operator", "{zzz: 1}"): "valid: generate_device, size",
    ("rule_operators.Operator", "{key: 1}"): "has no option 'key'",
    ("rule_operators.PickyOperator", "{colour: 1}"): "unknown option 'colour'",
    ("rule_operators.PickyOperator", "{size: 0}"): "size is 0, valid: from 1",
    ("rule_operators.NeedyOperator", "{}"): "needs the option 'colour'",
    ("torch.nn.Linear", "{}"): "is not an operator: its constructor does not take key, gguf_loader",
    ("builtins.type", "{}"): "is not an operator",
    ("torch.nn.Module", "{}"): "is not an operator",
    ("rule_operators.NotAModule", "{}"): "is not a torch.nn.Module",
    ("ktransformers.operators.linear.KTransformerLinear", "{}"): "KTransformersLinear'?",
}


@pytest.mark.parametrize("case", BAD_OPERATORS, ids=" ".join)
def test_bad_operator_leaves_the_model_as_it_was(write, case):
    model, found = injections(write, *case)
    original = model.layers[0].mlp
    with pytest.raises(RuleError, match=re.escape(BAD_OPERATORS[case])) as caught:
        inject(model, found, gguf_loader=None, config=None)
    assert (caught.value.rule, caught.value.line) == (1, 1)
    assert model.layers[0].mlp is original


# ---------------------------------------------------------------- aliases


def test_aliases_drop_kernel_options_keep_devices_and_say_so_once(write, caplog):
    file = write(
        "- match: {name: 'layers.0.mlp$'}\n"
        "  replace: {class: ktransformers.operators.experts.KTransformersExperts,"
        " kwargs: {generate_device: cpu, prefill_op: KExpertsTorch, out_device: cuda}}\n"
        "- match: {class: torch.nn.Linear}\n"
        "  replace: {class: ktransformers.operators.linear.KTransformersLinear, kwargs: {generate_op: X}}\n"
        "- match: {name: 'layers.1.mlp'}\n"
        "  replace: {class: ktransformers.operators.linear.KTransformersLinear}\n"
    )
    with caplog.at_level(logging.INFO, "hybrimoe_kt.host.rules.injection"):
        found = match_modules(tree(), load_rules(file), default_device="cpu")
    assert found["layers.0.mlp"].cls == "hybrimoe_kt.operators.experts.HybriMoEExperts"
    assert found["layers.0.mlp"].kwargs == {"generate_device": "cpu"}
    linear = "hybrimoe_kt.operators.linear.QuantizedLinear"
    assert (found["layers.0.mlp.0"].cls, found["layers.0.mlp.0"].kwargs) == (linear, {})
    assert len(caplog.messages) == 2
    assert "HybriMoEExperts, without prefill_op, out_device" in " ".join(caplog.messages)
