"""What a user gives vLLM: files, options, and what is said of those that cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hybrimoe_kt.errors import ConfigError, ModelError
from hybrimoe_kt.host.tokenizers.tokenizer import load_tokenizer
from hybrimoe_kt.host.vllm.arguments import _prepare
from hybrimoe_kt.models import embedded_model
from hybrimoe_kt.weights.gguf_file import GgufFile
from tests.support.generated_model import Shape
from tests.support.vocabularies import sentencepiece

from .offline import ROOT, here
from .server import started

Make = Callable[..., tuple[Path, Path]]


def prepared(model: Path | str, **given: Any) -> EngineArgs:
    args = EngineArgs(str(model), **given)
    _prepare(args)
    return args


def with_options(**options: Any) -> dict[str, Any]:
    return {"additional_config": {"hybrimoe": options}}


def test_a_file_names_everything(family: Make) -> None:
    file = family("qwen3moe")[1]
    args = prepared(file, **with_options(cache_size="25%"))
    assert (args.quantization, args.load_format) == ("hybrimoe", "hybrimoe")
    assert args.served_model_name == [str(file)]
    folder = Path(args.model)
    assert args.tokenizer == args.model
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [257]
    again = prepared(file)
    assert again.model == args.model, "made once"
    named = prepared(file, served_model_name=["tiny"], tokenizer=str(family("qwen3moe")[0]))
    assert named.served_model_name == ["tiny"]
    assert named.tokenizer == str(family("qwen3moe")[0])


def test_options_are_checked_at_once(family: Make) -> None:
    file = family("qwen3moe")[1]
    with pytest.raises(ConfigError, match=r"unknown option 'cache_sise'.*cache_size"):
        prepared(file, **with_options(cache_sise="25%"))
    with pytest.raises(ConfigError, match=r'"hybrimoe" is 3, valid: \{"cache_size"'):
        prepared(file, additional_config={"hybrimoe": 3})
    with pytest.raises(ConfigError, match=r"--enable-dbo .* leave it out"):
        prepared(file, enable_dbo=True)
    with pytest.raises(ConfigError, match=r"--prefill-context-parallel-size gathers"):
        prepared(file, prefill_context_parallel_size=2)
    with pytest.raises(ConfigError, match=r"--enable-lora changes experts"):
        prepared(file, enable_lora=True)


def test_models_that_are_none(family: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing.gguf: no such file or directory; download the model first"):
        prepared(tmp_path / "missing.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match=r"broken.gguf"):
        prepared(broken)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(family("qwen3moe")[1].read_bytes()[:20000])
    with pytest.raises(ModelError, match=r"cut.gguf"):
        prepared(cut)
    with pytest.raises(ModelError, match=r"vLLM has no Dots1ForCausalLM, so this model runs in `ktransformers` only"):
        prepared(family("dots1")[1])


def test_blocks_are_not_cut_for_tensor_parallel(tmp_path: Path) -> None:
    """The flag that works is named where one would look: at the end of what `vllm serve` says."""
    two = ("--tensor-parallel-size", "2")
    with started(embedded_model(), tmp_path, *two, options={}, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}) as server:
        assert server.process.wait(240) != 0
        said = server.log.read_text()
    assert "blocks of 256 values cannot be cut into 2 parts of 128; give --enable-expert-parallel" in said


def test_a_wrong_option_is_one_sentence_of_the_command(family: Make, tmp_path: Path) -> None:
    with started(family("qwen3moe")[1], tmp_path, options={"polisy": "lru"}) as server:
        assert server.process.wait(120) == 1
        said = server.log.read_text()
    last = said.strip().splitlines()[-1]
    assert last.startswith("vllm: error: unknown option 'polisy', did you mean 'policy'? valid: accelerator,")
    assert "Traceback" not in said


def test_options_that_the_page_names_are_vllms() -> None:
    page = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    text = page[: page.index("## SGLang")]
    asked = FlexibleArgumentParser()
    known = {flag for action in make_arg_parser(asked)._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(named) > 10
    assert not named - known


def test_a_tokenizer_that_no_file_holds(generated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece's pieces are merged in Python, so every process rebuilds the tokenizer from the file."""
    shape = Shape(vocabulary=sentencepiece(), hidden=64, inter=64, dense_inter=64, heads=2, kv_heads=1, layers=1)
    file = generated(shape).path
    assert prepared(file).tokenizer_mode == "hybrimoe"
    text = "Hello there, how  are you today?"
    options = {"accelerator": "none", "cpu_backend": "torch_reference"}
    monkeypatch.setattr(
        "tests.engines.vllm.offline.answers", lambda llm, tokens, count: llm.get_tokenizer().encode(text)
    )
    found = here(file, additional_config={"hybrimoe": options})
    assert found == load_tokenizer(GgufFile(file), None).encode(text)
