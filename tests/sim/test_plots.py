"""Pictures and documents: they are written, reproducible, and say what was measured."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrimoe_kt.cli.tools import main
from hybrimoe_kt.core.timeline import Span, Timeline
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sim import drawing, plots
from hybrimoe_kt.sim.experiments import ABLATION, COMPARED, POLICIES, PROMPTS, RATIOS, Cell
from hybrimoe_kt.sim.hit_rate import hit_rate, windowed
from hybrimoe_kt.sim.models import PAPER_MODELS
from hybrimoe_kt.sim.reproduction_text import Results, document
from hybrimoe_kt.sim.timeline import write_timeline
from hybrimoe_kt.sim.trace_file import read_trace

PNG, SVG = b"\x89PNG", b"<?xml"
TRACE = str(Path(__file__).parents[1] / "data" / "traces" / "gemma4-26b-a4b.npz")


SIMULATED = ["--model", "deepseek-v2-lite", "--prompt-tokens", "4", "--tokens", "1"]
PICTURES = {
    "speedups": ["--model", "mixtral-8x7b", "--method", "paper", "--method", "default", "--tokens", "1"],
    "hit-rate": ["--trace", TRACE, "--policy", "lru", "--policy", "belady"],
    "timeline": SIMULATED,
    "heat-map": ["--trace", TRACE, "--sorted"],
    "over-time": ["--trace", TRACE, "--policy", "lru", "--cache", "25%", "--cache", "8"],
    "occupancy": ["--trace", TRACE, "--layer", "3", "--policy", "lru"],
}


def numbers(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plot", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = tmp_path / "picture.png"
    assert main(["plot", name, *PICTURES[name], "--output", str(file)]) == 0
    assert file.read_bytes().startswith(PNG)
    assert capsys.readouterr().out == f"{file}\n"


def test_svg_is_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for name in ("a.svg", "b.svg"):
        figure = plots.hit_rate_lines("title", [1, 2], 4, {"lru": [0.1, 0.2], "belady": [0.2, 0.3]})
        texts.append(drawing.save(figure, tmp_path / name).read_bytes())
    assert texts[0] == texts[1]
    assert texts[0].startswith(SVG)


def test_the_heat_map_shows_shares_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    trace = read_trace(TRACE)
    shares = np.array(numbers(capsys, "heat-map", "--trace", TRACE)["share"])
    assert shares.shape == (len(trace.layers), trace.num_experts)
    np.testing.assert_allclose(shares.sum(axis=1), trace.top_k)
    rows = trace.experts[:, 2]
    assert shares[2, 5] == pytest.approx((rows == 5).any(axis=1).sum() / (rows[:, 0] >= 0).sum())
    ordered = np.array(numbers(capsys, "heat-map", "--trace", TRACE, "--sorted")["share"])
    assert (np.diff(ordered, axis=1) <= 0).all()


def test_hit_rate_over_time_ends_where_the_hit_rate_does(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = numbers(capsys, "over-time", "--trace", TRACE, "--policy", "lru", "--cache", "16", "--window", "1000")
    ((size, curves),) = drawn["hit_rate"].items()
    assert size == "16 of 128 experts"
    for policy, rates in curves.items():
        assert rates[-1] == pytest.approx(hit_rate(read_trace(TRACE), policy, 16)), "one window over everything"
        assert len(rates) == 128
    assert curves["belady"][-1] > curves["lru"][-1]
    assert rates[0] == 0, "caches begin empty"


def test_windows_move() -> None:
    assert windowed([(1, 2), (2, 2), (0, 2), (2, 2)], 2) == [0.5, 0.75, 0.5, 0.5]


def test_occupancy_tells_slots_hits_and_misses(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layer", "3", "--policy", "lru", "--cache", "12", "--to", "128"]
    drawn = numbers(capsys, "occupancy", "--trace", TRACE, *arguments)
    trace = read_trace(TRACE)
    held: set[int] = set()
    for step, row in zip(trace.phase_steps("decode"), drawn["steps"], strict=True):
        routed = set(trace.routing(step, 3).loads)
        assert set(row["hits"]) == routed & held
        assert set(row["misses"]) == routed - held
        held = set(row["in_slots"])
        assert routed <= held and len(held) <= 12
    assert 0 < drawn["hit_rate"] < 1


def timeline_file(tmp_path: Path) -> Path:
    timeline = Timeline(model="toy", origin="a test")
    for step in range(3):
        begin = 0.010 * step
        timeline.add(Span("step", 0, begin, begin + 0.008, "decode 1", "decode", details={"step": step, "tokens": 1}))
        timeline.add(Span("cpu", 0, begin + 0.001, begin + 0.004, "L0 E1 E2", "experts", 0, (1, 2), {"plan": step + 1}))
        timeline.add(Span("link", 1, begin + 0.007, begin + 0.009, "L1 E3 prefetch", "prefetch", 1, (3,)))
    return write_timeline(timeline, tmp_path / "run.json")


@pytest.mark.parametrize(
    ("arguments", "bounds_ms", "lanes"),
    [
        ([], (20, 28), {"CPU": (21, 24), "link 1": (27, 28)}),
        (["--step", "0"], (0, 8), {"CPU": (1, 4), "link 1": (7, 8)}),
        (["--from", "2", "--to", "9"], (2, 9), {"CPU": (2, 4), "link 1": (7, 9)}),
        (["--from", "25"], (25, 29), {"link 1": (27, 29)}),
    ],
)
def test_a_recorded_timeline_is_drawn_in_part(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    bounds_ms: tuple[float, float],
    lanes: dict[str, tuple[float, float]],
) -> None:
    file = str(timeline_file(tmp_path))
    drawn = numbers(capsys, "timeline", "--timeline", file, *arguments)
    assert (drawn["from_s"] * 1e3, drawn["to_s"] * 1e3) == pytest.approx(bounds_ms)
    assert {span["lane"]: pytest.approx((span["from_s"] * 1e3, span["to_s"] * 1e3)) for span in drawn["spans"]} == lanes
    picture = tmp_path / "step.svg"
    assert main(["plot", "timeline", "--timeline", file, *arguments, "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(SVG)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["timeline", "--model", "mixtral-8x7b", "--output", "x.jpg"], "end in .png or .svg"),
        (["timeline", "--output", "TMP/x.png"], "nothing to draw"),
        (["hit-rate", "--output", "TMP/x.png"], "nothing to draw"),
        (["hit-rate", "--trace", TRACE], "nothing to do: give --output FILE for a picture"),
        (["speedups", "--method", "papper", "--output", "TMP/x.png"], "did you mean 'paper'"),
        (["timeline", "--model", "mixtral-8x7b", "--tokens", "0", "--output", "TMP/x.png"], "use 1 or more"),
        (["heat-map", "--trace", "TMP/none.npz", "--json"], "none.npz: the trace cannot be opened"),
        (["heat-map", "--trace", "TMP/run.json", "--json"], "run.json:1: wrong header"),
        (["heat-map", "--trace", TRACE, "-o", "/nowhere/x.png"], "--output /nowhere/x.png: cannot be written there"),
        (
            ["occupancy", "--trace", TRACE, "--layer", "99", "--json"],
            "layer 99 is no MoE layer of this trace; valid: 0",
        ),
        (["occupancy", "--trace", TRACE, "--policy", "lrw", "--json"], "unknown policy 'lrw'"),
        (["occupancy", "--trace", TRACE, "--from", "500", "--json"], "the trace has 128"),
        (["over-time", "--trace", TRACE, "--cache", "0", "--json"], "leaves no slot"),
        (["over-time", "--trace", TRACE, "--window", "0", "--json"], "--window 0"),
        (["timeline", "--timeline", "TMP/none.json", "--json"], "none.json: the timeline cannot be opened"),
        (["timeline", "--timeline", TRACE, "--json"], "not a timeline, which is JSON"),
        (
            ["timeline", "--timeline", "TMP/run.json", "--step", "3", "--json"],
            "step 3 is not in the timeline; it has 0",
        ),
        (["timeline", "--timeline", "TMP/run.json", "--from", "40", "--json"], "the timeline has 29.000 ms"),
        (["timeline", "--timeline", "TMP/list.json", "--json"], "not a timeline as --timeline writes it"),
        (["timeline", "--model", "mixtral-8x7b", "--step", "3", "--json"], "--step picks from a recorded --timeline"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    timeline_file(tmp_path)
    (tmp_path / "list.json").write_text('{"traceEvents": [{"ph": "X"}]}', encoding="utf-8")
    assert main(["plot", *(word.replace("TMP", str(tmp_path)) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_s_help_has_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plot", name, "--help"])
    assert caught.value.code == 0
    assert f"hybrimoe plot {name} --" in capsys.readouterr().out


def test_missing_matplotlib_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'hybrimoe-kt\[plot\]'"):
        plots.hit_rate_lines("title", [1], 2, {"lru": [0.1]})


def made_up(paper: float, default: float) -> Results:
    """Every cell alike: static takes 1 s, the methods what is given, the bound 0.1 s."""
    seconds = {"static": 1.0, **dict.fromkeys(COMPARED, 0.9), "paper": paper, "default": default, "oracle": 0.2}
    hits = dict.fromkeys(seconds, 0.5)
    planned = {"static": 1.0, "freetoken": 0.5, "paper": 0.4, "default": 0.2, "host": 0.200, "device": 0.201}
    pairs = [(model, ratio) for model in PAPER_MODELS for ratio in RATIOS]
    return Results(
        decode=[Cell(model, ratio, 128, seconds, 0.1, hits) for model, ratio in pairs],
        prefill=[Cell(model, ratio, prompt, seconds, 0.1) for model, ratio in pairs for prompt in PROMPTS],
        ablation=dict.fromkeys(ABLATION, (1.0, 0.1)),
        hits={f"{model} {ratio}": dict.fromkeys(POLICIES, 0.5) for model, ratio in pairs},
        launch={0.0005: dict.fromkeys(("paper", "default", "oracle", "bound"), 1.5)},
        recorded=[Cell("trace", "25%", 0, seconds, 0.1, hits)],
        planned={"somewhere": [Cell("trace", "25%", 0, planned, 0.1, dict.fromkeys(planned, 0.5))]},
    )


def test_document_judges_by_the_numbers() -> None:
    text = document(made_up(paper=1 / 1.7, default=1 / 2.0))
    goals = [line for line in text.splitlines() if (line.startswith("|") and "met |" in line) or "met** |" in line]
    assert [line.endswith("| met |") for line in goals] == [True, False, False, True, True, True, False, False]
    assert "1.70x" in goals[0]
    assert "synthetic" in text
    assert "| somewhere, trace, 25% | 201.0 ms | +0.50 % | 50.0 % | 50.0 % | 50.0 % | 2.49x | 1.99x | 1.00x |" in text
    assert "apart is\n0.50 % in time and 0.00 % of a hit rate" in text
    assert "nan" not in text
