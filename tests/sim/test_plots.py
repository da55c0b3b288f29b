"""Pictures and documents: they are written, reproducible, and say what was measured."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from hybrimoe_kt.cli.tools import main
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sim import plots
from hybrimoe_kt.sim.experiments import ABLATION, COMPARED, POLICIES, PROMPTS, RATIOS, Cell
from hybrimoe_kt.sim.models import PAPER_MODELS
from hybrimoe_kt.sim.reproduction_text import Results, document

PNG, SVG = b"\x89PNG", b"<?xml"
TRACE = str(Path(__file__).parents[1] / "data" / "traces" / "gemma4-26b-a4b.npz")


@pytest.mark.parametrize(
    "arguments",
    [
        ["speedups", "--model", "mixtral-8x7b", "--method", "paper", "--method", "default"],
        ["hit-rate", "--trace", TRACE, "--policy", "lru", "--policy", "belady"],
        ["timeline", "--model", "deepseek-v2-lite", "--tokens", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_each_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    file = tmp_path / "picture.png"
    assert main(["plot", *arguments, "--prompt-tokens", "4", "--tokens", "1", "--output", str(file)]) == 0
    assert file.read_bytes().startswith(PNG)
    assert str(file) in capsys.readouterr().out


def test_svg_is_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for name in ("a.svg", "b.svg"):
        figure = plots.hit_rate_lines("title", [1, 2], 4, {"lru": [0.1, 0.2], "belady": [0.2, 0.3]})
        texts.append(plots.save(figure, tmp_path / name).read_bytes())
    assert texts[0] == texts[1]
    assert texts[0].startswith(SVG)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["timeline", "--model", "mixtral-8x7b", "--output", "x.jpg"], "end in .png or .svg"),
        (["timeline", "--output", "x.png"], "nothing to draw"),
        (["hit-rate", "--output", "x.png"], "nothing to draw"),
        (["speedups", "--method", "papper", "--output", "x.png"], "did you mean 'paper'"),
        (["timeline", "--model", "mixtral-8x7b", "--tokens", "0", "--output", "x.png"], "use 1 or more"),
    ],
)
def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["plot", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


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
    pairs = [(model, ratio) for model in PAPER_MODELS for ratio in RATIOS]
    return Results(
        decode=[Cell(model, ratio, 128, seconds, 0.1, hits) for model, ratio in pairs],
        prefill=[Cell(model, ratio, prompt, seconds, 0.1) for model, ratio in pairs for prompt in PROMPTS],
        ablation=dict.fromkeys(ABLATION, (1.0, 0.1)),
        hits={f"{model} {ratio}": dict.fromkeys(POLICIES, 0.5) for model, ratio in pairs},
        launch={0.0005: dict.fromkeys(("paper", "default", "oracle", "bound"), 1.5)},
        recorded=[Cell("trace", "25%", 0, seconds, 0.1, hits)],
    )


def test_document_judges_by_the_numbers() -> None:
    text = document(made_up(paper=1 / 1.7, default=1 / 2.0))
    goals = [line for line in text.splitlines() if (line.startswith("|") and "met |" in line) or "met** |" in line]
    assert [line.endswith("| met |") for line in goals] == [True, False, False, True, True, True, False, False]
    assert "1.70x" in goals[0]
    assert "synthetic" in text
    assert "nan" not in text
