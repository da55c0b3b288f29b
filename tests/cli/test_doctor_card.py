"""`hybrimoe doctor --model`: where the memory of a card would go, here or not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hybrimoe_kt.cli import doctor
from tests.cli.doctor_machine import no_profile_no_gpu, report, with_gpu

__all__ = ["no_profile_no_gpu", "with_gpu"]  # fixtures


def test_where_the_memory_of_a_card_that_is_not_here_would_go(
    capsys: pytest.CaptureFixture[str], embedded_model: Path
) -> None:
    given = ["--model", str(embedded_model), "--card-bytes", "2GiB", "--context-tokens", "600"]
    plan = report(capsys, *given)["model"]["plan"]
    assert (plan["card_bytes"], plan["context_tokens"], plan["refusal"]) == (2**31, 600, None)
    assert plan["slots_per_layer"] == 32 and plan["expert_share"] == 1.0
    assert sum(plan["lines"].values()) + plan["left_bytes"] == 2**31
    assert doctor.main(given) == 0
    shown = capsys.readouterr().out
    assert "emulated, 2.0 GiB" in shown and "keys and values of 600 tokens" in shown
    assert "slots: 32 a layer, 100.0% of the experts" in shown
    assert report(capsys, "--model", str(embedded_model))["model"]["plan"] is None
    with pytest.raises(SystemExit):
        doctor.main(["--card_bytes", "much"])
    assert "'much' is no size" in capsys.readouterr().err


@pytest.mark.usefixtures("with_gpu")
def test_a_card_that_is_too_small(capsys: pytest.CaptureFixture[str], embedded_model: Path) -> None:
    free = report(capsys, "--model", str(embedded_model))["model"]["plan"]
    assert (free["card"], free["card_bytes"], free["context_tokens"]) == ("cuda:0", 20 * 2**30, 1024)
    found = report(capsys, "--model", str(embedded_model), "--card_bytes", "513MiB")
    assert not found["model"]["fits_accelerator"] and not found["verdict"]["ready"]
    said = r"the dense weights take \S+ MiB, cuda:0 has 513\.0 MiB, 512\.0 MiB of it for CUDA's context"
    assert re.match(said, found["model"]["plan"]["refusal"]) and re.search(said, found["verdict"]["text"])
    assert doctor.main(["--model", str(embedded_model), "--card_bytes", "513MiB"]) == 0
    assert "take a larger card" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("with_gpu")
def test_a_card_that_is_larger_than_the_one_here(capsys: pytest.CaptureFixture[str], embedded_model: Path) -> None:
    plan = report(capsys, "--model", str(embedded_model), "--card_bytes", "80GiB")["model"]["plan"]
    assert plan["card_bytes"] == 80 * 2**30
