"""`hybrimoe trace`: record the routing of a text, an answer or a chat, and show its locality."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError

from .loading import load_engine
from .options import expert_overrides, parse_trace, sampling_of
from .terminal import INTERRUPTED, Abandoned, check_writable, interrupt_sets, read_text
from .timeline import timeline_to

if TYPE_CHECKING:
    from hybrimoe_kt.engine.engine import Engine
    from hybrimoe_kt.sim.record import Recorder

__all__ = ["main"]

COUNTERS = ("hits", "pending", "misses", "hit_rate", "experts_on_cpu", "experts_on_gpu", "num_transfers",
            "num_prefetches", "precision", "recall")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Record and report; raises HybriMoEError, which the dispatcher prints with exit code 2."""
    options = parse_trace(list(arguments))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    ExpertOptions.from_kwargs(expert_overrides(options))  # say what is wrong before anything is loaded
    out = _out(options.out)
    check_writable(out, "--out")
    check_writable(options.timeline, "--timeline")
    text = _text(options)
    if text is None and (options.json or not (sys.stdin.isatty() and sys.stdout.isatty())):
        raise ConfigError("nothing to record: give --text FILE or --prompt TEXT; a chat needs a terminal")
    engine = load_engine(options, console)
    recorder = _listen(engine, options.depth)
    session = _Session(engine, recorder, options, console)
    try:
        with timeline_to(options.timeline, engine, console):
            code = session.run(text)
    except BaseException:  # an error, or a reader of our output that has gone: what was recorded is kept
        if _save(engine, recorder, out) is not None:
            console.print(f"recorded until then: {out}", markup=False)
        raise
    saved = _save(engine, recorder, out)
    if saved is None:
        if code:
            return code
        raise ConfigError("nothing was recorded: no step was finished")
    _report(saved, session.answer, options.json)
    return code


class _Session:
    """One recording: a text, an answer, or a chat."""

    def __init__(self, engine: Engine, recorder: Recorder, options: argparse.Namespace, console: Console) -> None:
        self.engine, self.recorder, self.options, self.console = engine, recorder, options, console
        self.answer: str | None = None

    def run(self, text: str | None) -> int:
        """Record until done or interrupted; returns the exit code."""
        if text is None:
            return self._chat()
        stop = threading.Event()
        try:
            with interrupt_sets(stop):
                if self.options.text is not None:
                    self._feed(text, stop)
                else:
                    self._answer(text, stop)
        except Abandoned:
            return INTERRUPTED
        return INTERRUPTED if stop.is_set() else 0

    def _feed(self, text: str, stop: threading.Event) -> None:
        engine, options = self.engine, self.options
        ids = list(engine.tokenizer(text, verbose=False)["input_ids"])[: options.tokens]
        size = 1 if options.phase == "decode" else engine.runtime.options.max_chunk_tokens
        window = engine.context_tokens - 1
        with _Progress(len(ids), self.console) as advance:
            for at in range(0, len(ids), window):
                self.recorder.begin_request()
                for count in engine.feed(ids[at : at + window], size, stop):
                    self.recorder.begin_step(options.phase)
                    advance(count)
                if stop.is_set():
                    return

    def _answer(self, prompt: str, stop: threading.Event) -> None:
        pieces: list[str] = []
        options = self.options
        self.recorder.begin_request()
        for piece in self.engine.stream(prompt, sampling=sampling_of(options), stop=stop, as_written=True):
            pieces.append(piece)
            if not options.json:
                print(_visible(piece), end="", flush=True)
        if not options.json:
            print()
        self.answer = "".join(pieces)

    def _chat(self) -> int:
        from .chat import run_chat

        return run_chat(_Requests(self.engine, self.recorder), self.options, Console(highlight=False))


class _Requests:
    """An engine whose every answer is a request of its own in the recording."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine, self._recorder = engine, recorder
        self.model_name = engine.model_name
        self.last_run, self.statistics = engine.last_run, engine.statistics

    def stream(self, messages: list[dict[str, str]], **how: Any) -> Iterator[str]:
        self._recorder.begin_request()
        return self._engine.stream(messages, **how)


class _Progress:
    """A bar on the terminal's error stream, counting tokens; silent for scripts."""

    def __init__(self, total: int, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("recording"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("recording", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def _out(given: Path) -> Path:
    """The file as it will be named: the format's ending is appended where it is missing."""
    from hybrimoe_kt.sim.trace_file import SUFFIX

    return given if given.suffix == SUFFIX or not given.name else given.with_name(given.name + SUFFIX)


def _text(options: argparse.Namespace) -> str | None:
    """What is to be recorded, read before anything is loaded; None for a chat."""
    file = options.text if options.text is not None else options.prompt_file
    if file is not None:
        text, source = read_text(file, "--text" if options.text is not None else "--prompt_file"), str(file)
    elif options.prompt is not None:
        text, source = options.prompt.encode("utf-8", "replace").decode(), "--prompt"
    else:
        return None
    if not text.strip():
        raise ConfigError(f"{source} holds no text")
    return text


def _listen(engine: Engine, depth: int) -> Recorder:
    from hybrimoe_kt.host.hf.look_ahead import look_ahead
    from hybrimoe_kt.sim.record import Recorder

    runtime = engine.runtime
    look_ahead(engine.model, runtime, engine.loaded.architecture, depth)
    recorder = Recorder(engine.model_name, runtime.layer_specs())
    runtime.recorder = recorder
    return recorder


def _save(engine: Engine, recorder: Recorder, out: Path) -> Path | None:
    """Write every finished step; None if there is none."""
    recorder.drop_unfinished()
    if not recorder.num_tokens:
        return None
    counters = engine.runtime.statistics()
    run = {"runtime": engine.runtime.describe(), "counters": {name: counters[name] for name in COUNTERS}}
    recorder.run = engine.runtime.configuration() | run
    return recorder.save(out)


def _report(file: Path, answer: str | None, as_json: bool) -> None:
    from hybrimoe_kt.sim.locality import summarize
    from hybrimoe_kt.sim.trace_file import read_trace

    trace = read_trace(file)  # what is reported is what the file says
    facts: dict[str, Any] = {
        "file": str(file),
        "num_bytes": file.stat().st_size,
        "model": trace.model,
        "num_layers": len(trace.layers),
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "counters": trace.run["counters"],
        "locality": summarize(trace),
    }
    if as_json:
        print(json.dumps(facts | ({} if answer is None else {"text": answer}), indent=2, allow_nan=False))
        return
    from .trace_report import show

    show(facts, Console(highlight=False))


def _visible(text: str) -> str:
    from .chat_output import visible

    return visible(text, tab="\t")
