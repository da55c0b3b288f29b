"""`hybrimoe simulate` as a user meets it: tables, JSON, timelines, and one sentence for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hybrimoe_kt.cli.tools import COMMANDS, main
from tests.support.timelines import check, read

SMALL = ["--model", "deepseek-v2-lite", "--hardware", "default", "--prompt-tokens", "8", "--tokens", "2"]
TRACE = str(Path(__file__).parents[1] / "data" / "traces" / "gemma4-26b-a4b.npz")
KEYS = ("ttft_s", "token_s", "hit_rate", "prefill_speedup_over_static", "decode_speedup_over_static",
        "decode_oracle_fraction")  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_json_has_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "simulate", *SMALL, "--cache", "25%", "--json")
    report = json.loads(out)
    assert code == 0
    assert err == ""
    assert all(isinstance(report[key], float) and report[key] > 0 for key in KEYS)
    assert len(report["digest"]) == 64


def test_same_seed_same_digest(capsys: pytest.CaptureFixture[str]) -> None:
    digests = [
        json.loads(run(capsys, "simulate", *SMALL, "--seed", seed, "--json")[1])["digest"] for seed in ("1", "1", "2")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_table_shows_times_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "simulate", *SMALL, "--method", "paper")
    assert code == 0
    for words in ("time per token", "hit rate", "link busy", "over static", "oracle", "synthetic", "paper / mrs"):
        assert words in out


def test_parts_of_a_method_can_be_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "paper", "--scheduler", "fiddler", "--policy", "lru", "--prefetch", "off", "--json"]
    report = json.loads(run(capsys, "simulate", *SMALL, *arguments)[1])
    assert (report["scheduler"], report["policy"], report["prefetch"]) == ("fiddler", "lru", "off")
    assert report["decode"]["prefetches_per_step"] == 0


def test_recorded_trace_without_prompt_numbers_is_null_not_nan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "simulate", "--trace", TRACE, "--hardware", "default", "--tokens", "0", "--json")
    assert code == 0
    assert json.loads(out)["token_s"] is None


def test_timeline_is_a_chrome_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    code, out, _ = run(capsys, "simulate", *SMALL, "--timeline", str(file))
    assert code == 0
    assert str(file) in out
    lanes = check(file, {"steps", "scheduler", "GPU 0", "CPU", "link 0"})
    assert [event["name"] for event in lanes["steps"]][-3:] == ["prefill 8", "decode 1", "decode 1"]


def test_a_long_timeline_is_capped_and_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe_kt.core import timeline

    monkeypatch.setattr(timeline.Timeline.__init__, "__defaults__", (50,))
    file = tmp_path / "step.json"
    code, out, _ = run(capsys, "simulate", *SMALL, "--timeline", str(file))
    assert code == 0
    assert "only the beginning is kept: 50 spans" in out
    lanes, other = read(file)
    assert sum(map(len, lanes.values())) == 50
    assert "only the beginning" in other["note"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "mixtral-8x7"], "did you mean 'mixtral-8x7b'"),
        ([*SMALL, "--hardware", "defaul"], "did you mean 'default'"),
        ([*SMALL, "--method", "papper"], "did you mean 'paper'"),
        ([*SMALL, "--scheduler", "balance"], "did you mean 'balanced'"),
        ([*SMALL, "--policy", "lrw"], "unknown policy 'lrw'"),
        ([*SMALL, "--prefetch", "perfekt"], "did you mean 'perfect'"),
        ([*SMALL, "--cache", "0"], "leaves no slot"),
        ([*SMALL, "--cache", "120%"], "120%"),
        ([*SMALL, "--tokens", "-1"], "tokens -1 is negative"),
        ([*SMALL, "--noise", "-1"], "noise -1.0 is negative"),
        ([], "give --model NAME"),
        (["--trace", "none.npz"], "none.npz: the trace cannot be opened"),
        (["--trace", __file__], "test_simulate.py:1: wrong header"),
        ([*SMALL, "--timeline", "/nowhere/step.json"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, out, err = run(capsys, "simulate", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("hybrimoe simulate: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_binary_profile_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(b"\xff\xfe\x00")
    code, _, err = run(capsys, "simulate", *SMALL, "--hardware", str(file))
    assert code == 2
    assert "profile.json: not UTF-8 text" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(["rules", "list"]) == 2
    assert capsys.readouterr().err == "hybrimoe rules: standard output: No space left on device\n"


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", "--help"])
    assert caught.value.code == 0
    assert "hybrimoe simulate --model qwen2-57b-a14b" in capsys.readouterr().out


HELPS = ["simulate", "doctor", "calibrate", "trace", "rules", "rules check", "rules list", "plot", "plot timeline"]


@pytest.mark.parametrize("command", HELPS)
def test_every_help_has_an_example_and_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"hybrimoe {command} " in out[out.index("example") :]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("simulate --modle x", "unknown argument --modle, did you mean '--model'?"),
        ("simulate --tokens many", "invalid int value: 'many'"),
        ("doctor --josn", "did you mean '--json'?"),
        ("calibrate --repeats", "expected one argument"),
        ("trace --prompt Hi", "required: --out"),
        ("rules chek", "invalid choice: 'chek'"),
        ("rules check x.yaml --modle y", "did you mean '--model'?"),
        ("plot heatmap", "invalid choice: 'heatmap'"),
        ("plot occupancy --trace x --layr 2", "did you mean '--layer'?"),
    ],
)
def test_wrong_options_are_one_sentence(capsys: pytest.CaptureFixture[str], command: str, words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"hybrimoe {command.split()[0]}") and words in err
    assert err.count("\n") == 1


def test_dispatcher_lists_commands_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert run(capsys)[0] == 2
    code, _, err = run(capsys, "simulat")
    assert code == 2
    assert "did you mean 'simulate'" in err
    assert run(capsys, "--version")[1].startswith("hybrimoe 0.")
