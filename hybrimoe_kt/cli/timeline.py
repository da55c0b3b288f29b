"""`--timeline FILE` around anything that uses an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .chat_output import visible

if TYPE_CHECKING:
    from hybrimoe_kt.engine.engine import Engine

__all__ = ["timeline_to"]


@contextlib.contextmanager
def timeline_to(file: Path | None, engine: Engine, console: Console) -> Iterator[None]:
    """Record what the engine does and write it on the way out, whatever the way; nothing where `file` is None.

    Check that the file can be written before loading the model: `terminal.check_writable`.
    """
    if file is None:
        yield
        return
    from hybrimoe_kt.core.timeline import Timeline
    from hybrimoe_kt.sim.timeline import write_timeline

    engine.runtime.record_timeline(Timeline(model=engine.model_name))
    try:
        yield
    finally:
        timeline = engine.runtime.finish_timeline()
        if timeline is not None:
            write_timeline(timeline, file)
            note = f"; {timeline.note}" if timeline.note else ""
            text = f"timeline: {file} ({len(timeline.spans)} spans, for https://ui.perfetto.dev{note})"
            console.print(visible(text), style="dim", markup=False)
