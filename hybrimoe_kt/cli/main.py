"""The `ktransformers` command: load a model, then chat, answer once, or serve."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError, HybriMoEError

from .chat_output import health_word, visible
from .loading import open_engine, save_kept
from .options import expert_overrides, parse, sampling_of
from .terminal import INTERRUPTED, check_writable, discard_output, prepare_streams, read_text
from .timeline import timeline_to

if TYPE_CHECKING:
    from hybrimoe_kt.engine.engine import Engine

__all__ = ["main"]

_DEFAULT_PROMPT = "Hello! How are you today?"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    prepare_streams()
    options = parse(sys.argv[1:] if argv is None else argv)
    console = message_console()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return _run(options, console)
    except HybriMoEError as error:
        print(f"ktransformers: error: {visible(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return 0


def message_console() -> Console:
    """Where messages go: a terminal breaks their lines between words, a file gets them whole."""
    console = Console(stderr=True, highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def _run(options: argparse.Namespace, console: Console) -> int:
    for flag in options.without_effect:
        console.print(f"note: --{flag} has no effect here")
    ExpertOptions.from_kwargs(expert_overrides(options))  # say what is wrong before anything is loaded
    if options.is_server:
        from .serve import run_server

        return run_server(options, console)
    check_writable(options.stats_json, "--stats_json")
    check_writable(options.timeline, "--timeline")
    given = options.prompt is not None or options.prompt_file is not None
    interactive = not given and sys.stdin.isatty() and sys.stdout.isatty()
    prompt = None if interactive else _prompt(options, console)
    engine = open_engine(options, console)
    with timeline_to(options.timeline, engine, console):
        code = _chat(engine, options) if prompt is None else _answer_once(engine, options, prompt, console)
    save_kept(engine, options, console)
    return code


def _chat(engine: Engine, options: argparse.Namespace) -> int:
    from .chat import run_chat

    screen = Console(highlight=False)
    if options.gguf_path is None and options.model_path is None:
        screen.print("the small embedded model, which babbles: --gguf_path FILE.gguf runs a real one", style="dim")
    last = engine.last_run(), ""

    def after_answer(run: dict[str, Any], text: str) -> None:
        nonlocal last
        last = run, text
        if engine.shares is not None:
            screen.print(shares_line(engine.shares.per_token_ms()), style="dim")
            _print_failures(run, screen)

    code = run_chat(engine, options, screen, after_answer=after_answer)
    _write_report(engine, options.stats_json, *last)
    return code


def _prompt(options: argparse.Namespace, console: Console) -> str:
    if options.prompt is not None:
        # Bytes that are not valid in the user's encoding arrive as surrogates, which no tokenizer takes.
        text, source = options.prompt.encode("utf-8", "replace").decode(), "--prompt"
    elif options.prompt_file is not None:
        text, source = read_text(options.prompt_file, "--prompt_file"), str(options.prompt_file)
    else:
        text, source = _read_stdin(), "standard input"
        if not text.strip():
            console.print(f"no terminal and no prompt: answering {_DEFAULT_PROMPT!r}")
            return _DEFAULT_PROMPT
    if not text.strip():
        raise ConfigError(f"{source} holds no text; give a prompt")
    return str(text)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"standard input: {error.strerror}; use --prompt or --prompt_file") from None


def _say(text: str, end: str = "") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise ConfigError(f"the answer cannot be written to standard output: {error.strerror}") from None


def _answer_once(engine: Engine, options: argparse.Namespace, prompt: str, console: Console) -> int:
    stop = threading.Event()
    pieces: list[str] = []
    conversation = [{"role": "user", "content": prompt}]
    answer = engine.stream(conversation, sampling=sampling_of(options), stop=stop, as_written=True)
    try:
        for piece in answer:
            pieces.append(piece)
            _say(visible(piece, tab="\t"))
    except KeyboardInterrupt:
        stop.set()
        answer.close()
    _say("", end="\n")
    run = engine.last_run()
    console.print(statistics_line(run), style="dim")
    if engine.shares is not None:
        console.print(shares_line(engine.shares.per_token_ms()), style="dim")
        _print_failures(run, console)
    _write_report(engine, options.stats_json, run, "".join(pieces))
    return INTERRUPTED if stop.is_set() else 0


def _write_report(engine: Engine, file: Path | None, run: dict[str, Any], text: str) -> None:
    if file is None:
        return
    report: dict[str, Any] = {"model": engine.model_name, "runtime": engine.runtime.describe()} | run | {"text": text}
    if engine.shares is not None:
        report["per_token_ms"] = engine.shares.per_token_ms()
    try:
        file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--stats_json {file}: {error.strerror}") from None


def statistics_line(run: dict[str, Any]) -> str:
    """One line about a run."""
    reused = f" ({run['reused_tokens']} reused)" if run["reused_tokens"] else ""
    line = (
        f"prompt {run['prompt_tokens']} tokens{reused}, {run['prefill_tokens_per_s']:.1f} tok/s; "
        f"answer {run['new_tokens']} tokens, {run['decode_tokens_per_s']:.1f} tok/s; "
        f"experts: {run['experts_on_cpu']} CPU, {run['experts_on_gpu']} GPU"
    )
    if run["experts_on_gpu"] or run["transfers"]:
        line += f", hit rate {run['hit_rate']:.1%}, {run['transfers']} transfers, {run['prefetches']} prefetches"
    return f"{line}; {word}" if (word := health_word(run)) else line


def _print_failures(run: dict[str, Any], console: Console) -> None:
    """Say what the one word in the line before means."""
    from .chat_statistics import health_text

    if "health" in run and (text := health_text(run["health"])):
        console.print(visible(f"since the start: {text}"), style="yellow", markup=False)


def shares_line(shares: dict[str, float]) -> str:
    """Where a decoded token's time went."""
    names = ("experts", "attention", "replay", "overhead", "other")
    parts = ", ".join(f"{name} {shares[name]:.2f}" for name in names if name != "replay" or shares.get(name))
    return f"a token took {shares['total']:.2f} ms: {parts}"
