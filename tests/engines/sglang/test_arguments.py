"""What is taken of SGLang's arguments, changed, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed; docs/engines.md")

from sglang.srt.arg_groups.cuda_graph_hook import handle_cuda_graph_config
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.arg_groups.resolution_hooks import run_hook
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from hybrimoe_kt.errors import ConfigError, ModelError

from .offline import ENGINE, hybrimoe

Make = Callable[..., tuple[Path, Path]]


def resolved(model: Path, **given: Any) -> Any:
    """SGLang's arguments after all that it makes of them."""
    load_plugins()
    server_args = ServerArgs(model_path=str(model), **(ENGINE | given))
    server_args.resolve_once()
    return resolving_view(server_args)


def test_a_gguf_file_is_described_by_a_folder(family: Make) -> None:
    file = family("qwen3moe")[1]
    args = resolved(file, **hybrimoe({"cache_size": "25%"}))
    extra = json.loads(args.model_loader_extra_config)
    assert extra == {"hybrimoe": {"cache_size": "25%"}, "hybrimoe_file": str(file)}
    assert (args.quantization, args.load_format, args.served_model_name) == ("hybrimoe", "auto", file.stem)
    assert json.loads((Path(args.model_path) / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    assert args.tokenizer_path == args.model_path
    assert args.disable_overlap_schedule and args.disable_shared_experts_fusion


def test_options_alone_are_enough(family: Make) -> None:
    extra = hybrimoe({})["model_loader_extra_config"]
    assert resolved(family("qwen3moe")[0], model_loader_extra_config=extra).quantization == "hybrimoe"


def test_other_models_stay_sglangs(family: Make) -> None:
    args = resolved(family("qwen3moe")[0])
    assert args.quantization is None and args.model_path == str(family("qwen3moe")[0])
    assert not args.disable_overlap_schedule


def graphs(folder: Path, **given: Any) -> tuple[str, str]:
    """How decode and prefill are captured, after the step that decides it; attention on a CPU takes none at all."""
    load_plugins()
    server_args = ServerArgs(model_path=str(folder), quantization="hybrimoe", **given)
    run_hook(handle_cuda_graph_config, server_args)
    config = resolving_view(server_args).cuda_graph_config
    return config.decode.backend, config.prefill.backend


def test_graphs_are_left_out_unless_they_break(family: Make) -> None:
    folder = family("qwen3moe")[0]
    assert graphs(folder) == ("disabled", "disabled")
    assert graphs(folder, cuda_graph_backend_decode="breakable") == ("breakable", "disabled")
    with pytest.raises(ConfigError, match="--cuda-graph-backend-decode breakable"):
        graphs(folder, cuda_graph_backend_decode="full")


REFUSED: list[tuple[dict[str, Any], str]] = [
    (hybrimoe({"cache_sise": 1}), "cache_size"),
    ({"quantization": "hybrimoe", "model_loader_extra_config": "{]"}, "--model-loader-extra-config"),
    ({"quantization": "hybrimoe", "model_loader_extra_config": '{"hybrimoe": 3}'}, '"hybrimoe" is 3'),
    (hybrimoe({}) | {"quantization": "fp8"}, "--quantization fp8"),
    (hybrimoe({}) | {"load_format": "dummy"}, "--load-format dummy"),
    (hybrimoe({}) | {"enable_eplb": True}, "--enable-eplb"),
    (hybrimoe({}) | {"pp_size": 2}, "--pp-size 2"),
    (hybrimoe({}) | {"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE"),
]


@pytest.mark.parametrize(("given", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_errors_name_what_is_wrong(family: Make, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        resolved(family("qwen3moe")[1], **given)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        resolved(tmp_path / "absent.gguf", **hybrimoe({}))
