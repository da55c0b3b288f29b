"""Converts Hugging Face directories with llama.cpp's published converter: `convert_models.py LLAMA_CPP KIND FOLDER...`.

Runs in a process of its own, because the converter brings its own `gguf`. The generated models' vocabulary is none
that it knows, so only the vocabulary is written here; every tensor and every other key is the converter's.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any


def convert(folder: Path, kind: str) -> None:
    """Write `folder`'s model to `folder/model.gguf`; `kind` is the converter's name of the types in the file."""
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    hparams = ModelBase.load_hparams(folder, False)
    cls = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    cls.no_mtp = True  # as its option --no-mtp: these models have no layers that look ahead
    cls.set_vocab = write_vocabulary
    given: dict[str, Any] = {}
    if (restate := _AS_RELEASED.get(str(hparams.get("model_type")))) is not None:
        restate(hparams, json.loads((folder / "config.json").read_text()))
        given = {"hparams": hparams}
    with torch.inference_mode():
        fused = hparams.get("fuse_gate_up", False)  # as its option --fuse-gate-up-exps
        model = cls(folder, gguf.LlamaFileType[kind], folder / "model.gguf", fuse_gate_up_exps=fused, **given)
        if cls.__name__ == "BailingMoeModel":
            model.model_tensors = _named_as_ling(model.model_tensors)
        model.write()


def _qwen4(hparams: dict[str, Any], written: dict[str, Any]) -> None:
    hparams["layer_types"] = [kind.replace("indexed", "full") for kind in hparams["layer_types"]]


def _mimo(hparams: dict[str, Any], written: dict[str, Any]) -> None:
    kinds = hparams["rope_parameters"]
    hparams["rope_parameters"] = kinds["full_attention"]
    hparams["swa_rope_theta"] = kinds["sliding_attention"]["rope_theta"]


def _ling(hparams: dict[str, Any], written: dict[str, Any]) -> None:
    hparams |= written


def _named_as_ling(tensors: dict[str, Any]) -> dict[str, Any]:
    """Granite's tensors, by functions that read them, under the names and in the parts of Ling 1's checkpoints."""
    import torch

    found = dict(tensors)

    def rows_of(whole: str, names: list[str]) -> None:
        halves = found.pop(whole)
        for place, name in enumerate(names):
            found[name] = lambda place=place: halves().chunk(len(names), dim=-2)[place]

    for layer in range(sum(name.endswith("moe.input_linear.weight") for name in tensors)):
        prefix = f"model.layers.{layer}."
        parts = [found.pop(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
        found[f"{prefix}attention.query_key_value.weight"] = lambda parts=parts: torch.cat([part() for part in parts])
        found[f"{prefix}attention.dense.weight"] = found.pop(f"{prefix}self_attn.o_proj.weight")
        found[f"{prefix}mlp.gate.weight"] = found.pop(f"{prefix}block_sparse_moe.router.layer.weight")
        shared, mlp = f"{prefix}shared_mlp.", f"{prefix}mlp."
        rows_of(f"{shared}input_linear.weight", [f"{mlp}shared_experts.{name}_proj.weight" for name in ("gate", "up")])
        found[f"{mlp}shared_experts.down_proj.weight"] = found.pop(f"{shared}output_linear.weight")
        gate_up = found.pop(f"{prefix}block_sparse_moe.input_linear.weight")
        down = found.pop(f"{prefix}block_sparse_moe.output_linear.weight")
        for expert in range(len(down())):
            for place, name in enumerate(("gate", "up")):
                found[f"{mlp}experts.{expert}.{name}_proj.weight"] = (
                    lambda gate_up=gate_up, expert=expert, place=place: gate_up()[expert].chunk(2)[place]
                )
            found[f"{mlp}experts.{expert}.down_proj.weight"] = lambda down=down, expert=expert: down()[expert]
    found["model.word_embeddings.weight"] = found.pop("model.embed_tokens.weight")
    return found


def _minimax(hparams: dict[str, Any], written: dict[str, Any]) -> None:
    for key, value in written.items():
        hparams.setdefault(key, value)


_AS_RELEASED = {
    "qwen4_exp_text": _qwen4,
    "mimo_v2_flash": _mimo,
    "bailing_hybrid": _ling,
    "minimax_m3_vl_text": _minimax,
}
"""Says a configuration as a released config.json does, where Transformers puts it in other words as it reads it."""


def write_vocabulary(model: Any) -> None:
    """Stand in for the converter's `set_vocab`, which only knows released vocabularies."""
    tokenizer = json.loads((model.dir_model / "tokenizer.json").read_text())
    special = [token["content"] for token in tokenizer["added_tokens"]]
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__) + special
    writer = model.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - len(special)) + [3] * len(special))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(model.hparams["eos_token_id"])
    writer.add_pad_token_id(model.hparams["pad_token_id"])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/gguf-py"]
    for name in sys.argv[3:]:
        convert(Path(name), sys.argv[2])
