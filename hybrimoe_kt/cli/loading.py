"""From a command line to a loaded engine, with a word about it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hybrimoe_kt.device.cores import let_idle_threads_sleep
from hybrimoe_kt.errors import ConfigError, ModelError
from hybrimoe_kt.models import embedded_model
from hybrimoe_kt.sizes import parse_bytes
from hybrimoe_kt.weights.overrides import parse_overrides

from .chat_output import visible
from .options import expert_overrides
from .server_options import DEFAULT_PARALLEL

if TYPE_CHECKING:
    from hybrimoe_kt.engine.engine import Engine

__all__ = ["load_engine", "open_engine", "save_kept"]


def open_engine(options: argparse.Namespace, console: Console) -> Engine:
    """Load what the options name, and say what came of it."""
    if options.kept_path is not None:
        _check_folder(options.kept_path)
    began = time.perf_counter()
    engine = load_engine(options, console)
    loaded = f"{engine.model_name}: {engine.runtime.describe()} ({time.perf_counter() - began:.1f} s)"
    console.print(visible(loaded), markup=False)
    for plan in engine.loaded.plans.values():
        console.print(visible(plan.line()), markup=False)
    _note_unused(engine, options, console)
    if options.kept_path is not None:
        if not engine.can_save_kept:
            console.print("note: --kept_path has no effect: this model's conversations cannot be copied", markup=False)
        num = engine.restore_kept(options.kept_path)
        console.print(visible(f"{_conversations(num)} to go on from in {options.kept_path}"), markup=False)
    return engine


def save_kept(engine: Engine, options: argparse.Namespace, console: Console) -> None:
    """Write conversations where `--kept_path` says, if it says; a warning where that cannot be done."""
    if options.kept_path is None:
        return
    num_bytes = 0

    def on_saved(size: int) -> None:
        nonlocal num_bytes
        num_bytes += size
        status.update(f"keeping conversations: {num_bytes / 1e6:,.0f} MB")

    with console.status("keeping conversations") as status:
        try:
            num = engine.save_kept(options.kept_path, on_saved)
        except ConfigError as error:
            console.print(f"warning: {visible(str(error))}", markup=False)
            return
    console.print(visible(f"{_conversations(num)} kept in {options.kept_path}"), markup=False)


def _check_folder(folder: Path) -> None:
    """Make it, before anything is loaded; ConfigError where nothing can be written there."""
    reason = ""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
    if not reason and not os.access(folder, os.W_OK | os.X_OK):
        reason = "nothing can be written there"
    if reason:
        raise ConfigError(f"--kept_path {folder}: {reason}; give another folder")


def _conversations(num: int) -> str:
    return f"{num} conversation{'' if num == 1 else 's'}"


def load_engine(options: argparse.Namespace, console: Console) -> Engine:
    """Load what the options name; imports torch and transformers, which takes seconds."""
    gguf_path = _model_file(options)
    with console.status("starting torch and transformers"):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        let_idle_threads_sleep()
        from hybrimoe_kt.engine.build import build_engine

    engine = build_engine(
        gguf_path,
        model_path=options.model_path,
        rules_path=options.optimize_rule_path,
        dtype=options.dtype,
        context_tokens=options.cache_lens,
        option_overrides=expert_overrides(options),
        metadata=parse_overrides(options.override_kv),
        kv_cache_type=options.kv_cache_type,
        progress=sys.stderr.isatty(),
        time_shares=options.verbose,
        eager=options.eager,
        parallel=_parallel(options),
        cache_ram=_cache_ram(options),
    )
    if options.reasoning_effort is not None:
        _set_effort(engine, options.reasoning_effort)
    return engine


def _parallel(options: argparse.Namespace) -> int:
    if not getattr(options, "is_server", False):
        return 1
    return DEFAULT_PARALLEL if options.parallel is None else int(options.parallel)


def _cache_ram(options: argparse.Namespace) -> int | None:
    text = options.cache_ram
    if text is None or text == "0":
        return None if text is None else 0
    num_bytes = parse_bytes(text)
    if not num_bytes:
        raise ConfigError(f"--cache_ram {text!r} is not understood: give bytes, such as 500MiB or 8GiB, or 0")
    return num_bytes


def _set_effort(engine: Engine, effort: str) -> None:
    """Make it what the chat template is told by default; ConfigError where that reads nothing of the kind."""
    from hybrimoe_kt.engine.chat.thinking import effort_options

    given = effort_options(engine.vocabulary.takes, effort)
    if given is None:
        raise ConfigError(
            f"--reasoning_effort {effort}: the chat template of {engine.model_name!r} has no such option; leave it out"
        )
    engine.vocabulary.default_options = given


def _model_file(options: argparse.Namespace) -> Path:
    if options.gguf_path is not None:
        return Path(options.gguf_path)
    if options.model_path is None:
        return embedded_model()
    try:
        names = os.listdir(options.model_path)
    except OSError as error:
        raise ModelError(f"--model_path {options.model_path}: {error.strerror}; give a directory") from None
    if not any(name.lower().endswith((".gguf", ".safetensors")) for name in names):
        raise ModelError(f"{options.model_path}: no .gguf or .safetensors file there; name one with --gguf_path")
    return Path(options.model_path)


def _note_unused(engine: Engine, options: argparse.Namespace, console: Console) -> None:
    """Say which options the loaded model cannot follow."""
    if not engine.runtime.accelerators:
        for flag in ("cache_size", "policy", "scheduler", "prefetch_size", "prefetch_depth"):
            if getattr(options, flag) is not None:
                console.print(f"note: --{flag} has no effect without an accelerator")
    if options.cache_lens is not None and options.cache_lens > engine.context_tokens:
        console.print(f"note: --cache_lens {options.cache_lens}: the model's limit is {engine.context_tokens} tokens")
