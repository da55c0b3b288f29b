"""What engines want of a model beside its weights, as a folder: config.json, tokenizer, chat template, where texts end.

A GGUF file has all of that in its metadata; a checkpoint has it already, and gets a folder only where its config.json
speaks of a quantisation that an engine must not look for, as weights are read here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from hybrimoe_kt.cache_folder import cache_folder
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.language_models import language_model
from hybrimoe_kt.host.hf.sources import Source, open_source
from hybrimoe_kt.host.tokenizers.file_vocabulary import end_ids
from hybrimoe_kt.host.tokenizers.tokenizer import load_tokenizer
from hybrimoe_kt.version import __version__
from hybrimoe_kt.weights.checkpoint import is_checkpoint
from hybrimoe_kt.weights.gguf_file import GgufFile

__all__ = ["GGUF_NOTE", "has_tokenizer", "model_folder", "outline_of"]

GGUF_NOTE = "hybrimoe.json"
"""Says of which GGUF file a folder was made."""
_QUANTIZATION = "quantization_config"


def outline_of(source: Source) -> Any:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return language_model(source.config)


def model_folder(path: str | Path, architecture: Callable[[str], str] = str) -> Path:
    """Return a folder that describes the model at `path` to an engine, made once for every file; ModelError.

    `architecture` turns the name of Transformers' class into the engine's.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory")
    if is_checkpoint(path):
        return _plain_checkpoint(path)
    source = open_source(path, None)
    assert isinstance(source.file, GgufFile), "no checkpoint"
    file = source.file.path
    stamp = f"{__version__}:{transformers.__version__}:{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
    return _made_once(stamp, lambda folder: _describe(source, folder, architecture))


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds a tokenizer; else it is in the file alone, see `_save_tokenizer`."""
    note = Path(folder) / GGUF_NOTE
    return not note.is_file() or bool(json.loads(note.read_text(encoding="utf-8"))["has_tokenizer"])


def _describe(source: Source, folder: Path, architecture: Callable[[str], str]) -> None:
    file, config, outline = source.file, source.config, outline_of(source)
    assert isinstance(file, GgufFile), "what a folder is made of"
    tokenizer = load_tokenizer(file, None)
    is_written = _save_tokenizer(tokenizer, folder)
    config.architectures, config.dtype = [architecture(type(outline).__name__)], torch.bfloat16
    if source.rotary is not None:
        config.rope_parameters = source.rotary.published(dict(config.rope_parameters))
    for name, value in source.architecture.published_config(config).items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    ends = end_ids(file.metadata, tokenizer.added_tokens_encoder)
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(ends) or None).save_pretrained(folder)
    note = {"gguf": str(file.path), "has_tokenizer": is_written}
    (folder / GGUF_NOTE).write_text(json.dumps(note), encoding="utf-8")


def _save_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Whether it could be written: what merges in Python (SentencePiece's vocabularies) cannot."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception:  # the tokenizers library raises bare ones
        return False
    return True


def _plain_checkpoint(path: Path) -> Path:
    """The directory itself, or one of links with a config.json that knows no quantisation."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}/config.json cannot be used: {error}") from None
    if _QUANTIZATION not in config and _QUANTIZATION not in config.get("text_config", {}):
        return path

    def link(folder: Path) -> None:
        for entry in path.iterdir():
            if entry.name != "config.json":
                (folder / entry.name).symlink_to(entry)
        config.pop(_QUANTIZATION, None)
        config.get("text_config", {}).pop(_QUANTIZATION, None)
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    return _made_once(f"{__version__}:{path}:{json.dumps(config, sort_keys=True)}", link)


def _made_once(stamp: str, make: Callable[[Path], None]) -> Path:
    """The folder of this stamp: whole or not there, also where several processes make it at once."""
    above = cache_folder() / "engines"
    target = above / hashlib.sha256(stamp.encode()).hexdigest()[:20]
    if target.is_dir():
        return target
    above.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="being-made-", dir=above))
    try:
        make(made)
        os.replace(made, target)
    except OSError:
        if not target.is_dir():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target
