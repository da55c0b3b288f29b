"""`hybrimoe rules`: what it prints for people and for scripts."""

from __future__ import annotations

import json
import re

import pytest

from hybrimoe_kt.cli.rules import main
from hybrimoe_kt.errors import ModelError, RuleError
from hybrimoe_kt.host.rules.report import path_patterns

RULES = """\
- match: {name: '^model\\.layers\\.([0-3]|5)\\.mlp\\.experts$'}
  replace: {class: ktransformers.operators.experts.KTransformersExperts, kwargs: {generate_device: cpu, prefill_op: X}}
  recursive: false
- match: {class: torch.nn.Embedding}
  replace: {kwargs: {generate_device: cuda, prefill_device: cuda}}
- match: {name: nowhere}
  replace: {}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(RULES)
    return path


def test_json_tells_every_module(file, capsys):
    assert main(["check", str(file), "--model", "qwen3moe", "--device", "xpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    first, second, third = report["rules"]
    assert first["modules"] == [f"model.layers.{i}.mlp.experts" for i in (0, 1, 2, 3, 5)]
    assert (first["operator"], first["kwargs"]) == (
        "hybrimoe_kt.operators.experts.HybriMoEExperts",
        {"generate_device": "cpu"},
    )
    assert (second["modules"], second["line"]) == (["model.embed_tokens"], 4)
    assert third["modules"] == []
    assert report["unused"] == [3]
    assert {"prefill_device": "cuda", "generate_device": "cuda", "modules": ["model.embed_tokens"]} in report["devices"]
    assert report["devices"][0]["prefill_device"] == "xpu"
    assert "lm_head" in report["unmatched"]
    assert report["modules"] == len(report["unmatched"]) + 6


@pytest.mark.parametrize(
    ("operator", "kwargs", "said"),
    [
        ("linear.QuantizedLinear", "{cpu: gglm}", r"unknown cpu 'gglm', did you mean 'ggml'\? valid: float, ggml"),
        ("linear.QuantizedLinear", "{cpus: ggml}", r"has no option 'cpus', did you mean 'cpu'\?"),
        ("attention_mla.AbsorbedMLA", "{cpu: flot}", r"unknown cpu 'flot', did you mean 'float'\?"),
        ("embedding.QuantizedEmbedding", "{cpu: float}", "has no option 'cpu'"),
    ],
)
def test_options_of_packed_operators_are_checked(operator, kwargs, said, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        f"- {{match: {{name: o_proj$}}, replace: {{class: hybrimoe_kt.operators.{operator}, kwargs: {kwargs}}}}}\n"
    )
    with pytest.raises(RuleError, match=f"my.yaml:1: rule 1: hybrimoe_kt.operators.{operator}:? {said}"):
        main(["check", str(file), "--model", "deepseek2"])


def test_text_folds_layers_and_warns(file, capsys):
    assert main(["check", str(file), "--model", "mixtral"]) == 0
    shown = capsys.readouterr().out
    assert "-> HybriMoEExperts 5 modules\n      model.layers.{0..3,5}.mlp.experts\n" in shown
    assert "warning: rule 3 (line 6) decides nothing on this model" in shown
    assert "KTransformersExperts stands for hybrimoe_kt.operators.experts.HybriMoEExperts, without prefill_op" in shown


def test_the_device_map_follows_a_token(capsys):
    assert main(["check", "mixtral-multi-gpu"]) == 0
    shown = capsys.readouterr().out
    assert "on mixtral, " in shown, "a split is tried on the model it is named after"
    assert "   cuda:0: model.embed_tokens, model.layers.{0..15}\n" in shown
    assert "   cuda:1: model.layers.{16..31}, model.norm, lm_head\n" in shown
    assert "   crosses between model.layers.15 and model.layers.16\n" in shown
    assert main(["check", "mixtral-multi-gpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["placement"]["crossings"] == [["model.layers.15", "model.layers.16"]]
    assert report["unused"] == []


def test_the_architecture_that_fits_is_found(tmp_path, capsys):
    file = tmp_path / "x.yaml"
    file.write_text("- match: {class: ktransformers.models.modeling_deepseek_v3.MoEGate}\n  replace: {}\n")
    assert main(["check", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "deepseek3"
    assert main(["check", "deepseek2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["unused"]) == ("deepseek2", [])


def test_a_directory_with_a_configuration(tmp_path, capsys):
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 8, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", "qwen3moe", "--model", str(tmp_path)]) == 0
    assert "model.layers.{0..2}.mlp.experts" in capsys.readouterr().out


def test_mistakes_are_one_sentence(file, tmp_path):
    for name, sentence in (("qwen3mo", "did you mean 'qwen3moe'"), (str(tmp_path), "no config.json there")):
        with pytest.raises(ModelError, match=sentence):
            main(["check", str(file), "--model", name])
    for config in ("{", "{}", '{"model_type": "no_such_model"}', '{"model_type": "qwen3_moe", "hidden_size": "x"}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=r"config\.json describes no model known here: [^\n]+$"):
            main(["check", str(file), "--model", str(tmp_path)])
    with pytest.raises(RuleError, match="does not exist"):
        main(["check", "none.yaml"])
    file.write_text(RULES.replace("KTransformersExperts", "KTransformersExpert"))
    with pytest.raises(RuleError, match=r"my\.yaml:1: rule 1: .*did you mean .*KTransformersExperts'"):
        main(["check", str(file), "--model", "qwen3moe"])


def test_list(capsys):
    assert main(["list"]) == 0
    assert re.search(r"qwen3moe +8 rules +qwen3moe\.yaml", capsys.readouterr().out)
    assert main(["list", "--json"]) == 0
    assert {row["architecture"] for row in json.loads(capsys.readouterr().out)} >= {"qwen3moe", "deepseek2"}


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["check", "--help"])
    assert exit_code.value.code == 0
    assert "hybrimoe rules check my.yaml" in capsys.readouterr().out


def test_paths_fold_in_their_first_number():
    paths = ["", "a.0.b", "a.2.b", "a.1.b", "a.7.b", "a.3", "c.1.d.2", "c.2.d.2", "c2.x"]
    assert path_patterns(paths) == ["(model)", "a.{0..2,7}.b", "a.3", "c.{1..2}.d.2", "c2.x"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("{policy: mrs, policy_options: {alfa: 0.05}}", "unknown option 'alfa', did you mean 'alpha'"),
        ("{scheduler_options: {exact_experts: many}}", "option exact_experts is 'many'; give a number"),
        ("{predictor: stale_gat}", "unknown predictor 'stale_gat', did you mean 'stale_gate'"),
        ("{accelerator: 'emulatd'}", "unknown accelerator 'emulatd', did you mean 'emulated'"),
        ("{cpu_backend: lamafile}", "did you mean 'llamafile'"),
    ],
)
def test_options_of_options_are_checked_without_a_model(tmp_path, kwargs, message):
    path = tmp_path / "my.yaml"
    name, cls = "'^model\\.layers\\..*\\.mlp\\.experts$'", "hybrimoe_kt.operators.experts.HybriMoEExperts"
    path.write_text(f"- match: {{name: {name}}}\n  replace: {{class: {cls}, kwargs: {kwargs}}}\n")
    with pytest.raises(RuleError, match=message):
        main(["check", str(path), "--model", "qwen3moe"])
