"""Where graphs are captured in pieces our layers lie between them, and write where the next piece reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.vllm import arguments
from hybrimoe_kt.host.vllm.names import OP, SPLITTING_OP

from . import splits
from .offline import here

Make = Callable[..., tuple[Path, Path]]
LAYERS = 3


def calls(piece: Any) -> list[Any]:
    return [node for node in piece.graph.nodes if node.op == "call_function" and "vllm" in str(node.target)]


@pytest.mark.parametrize("name", ["qwen3moe", "qwen2moe"])
def test_every_moe_layer_is_an_eager_piece(family: Make, name: str) -> None:
    checkpoint, file = family(name)
    options = {"accelerator": "emulated", "cache_size": "25%", "cpu_backend": "torch_reference"}
    compiled = {"mode": 2, "backend": f"{splits.__name__}.backend"}
    splits.PIECES.clear()
    found = here(file, enforce_eager=False, compilation_config=compiled, additional_config={"hybrimoe": options})
    assert found == here(checkpoint)
    ours = [node for piece in splits.PIECES for node in calls(piece) if OP in str(node.target)]
    attention = [node for piece in splits.PIECES for node in calls(piece) if "attention" in str(node.target)]
    assert len(ours) == LAYERS
    assert len(attention) == LAYERS
    for node in ours:
        out, shared = node.args[4:6]
        assert out.op == "placeholder", "memory of a piece that is captured, not of the eager one"
        assert shared.op == "placeholder"
        assert not node.users, "nothing is answered in new memory"
    assert all(len(calls(piece)) == 1 for piece in splits.PIECES), "a piece is one layer's work"


def prepared(monkeypatch: pytest.MonkeyPatch, file: Path, **compilation: Any) -> Any:
    """Arguments as they are on a machine with a card."""
    monkeypatch.setattr(arguments, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    args = arguments.EngineArgs(str(file), compilation_config=CompilationConfig(**compilation))
    arguments._prepare(args)
    return args


def test_graphs_are_captured_in_pieces(monkeypatch: pytest.MonkeyPatch, family: Make) -> None:
    file = family("qwen3moe")[1]
    for given in ({}, {"cudagraph_mode": "FULL_AND_PIECEWISE"}, {"cudagraph_mode": "PIECEWISE"}):
        assert prepared(monkeypatch, file, **given).compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert prepared(monkeypatch, file, cudagraph_mode="NONE").compilation_config.cudagraph_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY"])
def test_whole_graphs_are_refused_with_the_flag(monkeypatch: pytest.MonkeyPatch, family: Make, mode: str) -> None:
    with pytest.raises(ConfigError, match=r"captures? decisions .*\"cudagraph_mode\": \"PIECEWISE\".*--enforce-eager"):
        prepared(monkeypatch, family("qwen3moe")[1], cudagraph_mode=mode)


def test_what_vllm_splits_at_and_we_add() -> None:
    """After vLLM has resolved its own: its attention operators stay, ours comes behind."""
    found = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode="FULL_AND_PIECEWISE")
    found.set_splitting_ops_for_v1("allgather_reducescatter")
    arguments._complete_graphs(found)
    assert set(CompilationConfig._attention_ops) <= set(found.splitting_ops)
    assert found.splitting_ops[-1] == SPLITTING_OP
    assert found.cudagraph_mode == CUDAGraphMode.PIECEWISE


def test_graphs_that_would_hold_a_layer_of_ours_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode="FULL")
    fused.splitting_ops = []  # as vLLM has it where attention is fused with quantisation
    with pytest.raises(ConfigError, match=r"captures whole graphs .* --enforce-eager"):
        arguments._complete_graphs(fused)
    broken = CompilationConfig(cudagraph_mode="FULL_AND_PIECEWISE")
    monkeypatch.setattr(arguments, "is_breakable_cudagraph_enabled", lambda: True)
    arguments._complete_graphs(broken)
    assert broken.cudagraph_mode == CUDAGraphMode.NONE
