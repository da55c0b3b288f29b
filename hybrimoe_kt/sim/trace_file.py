"""The compact trace format: one zip of NumPy arrays (`.npz`) with a JSON header, version 1.

`header` (a string array) holds `format`, `version`, `model`, `layers`, `num_experts`, `expert_bytes`, `source`;
`requests`, `phases` (0 prefill, 1 decode) and `num_tokens` have one entry per step; `experts`, `weights` and the
optional `scores`, `predicted`, `predicted_scores` are shaped as in `Trace`. Probabilities keep single precision: a
replayed trace must decide exactly as the recorded run did. The same trace always gives the same bytes.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe_kt.errors import ConfigError

from .trace import Trace, check, make_steps
from .trace_csv import PHASES, read_csv

FORMAT = "hybrimoe-trace"
VERSION = 1
SUFFIX = ".npz"
OPTIONAL = ("scores", "predicted", "predicted_scores")
_ZIP_MAGIC = b"PK"


def write_trace(trace: Trace, path: str | Path) -> Path:
    """Write `trace` as `path` (whole or not at all) and return the path, `.npz` appended if it was missing."""
    file = Path(path)
    if file.suffix != SUFFIX:
        file = file.with_name(file.name + SUFFIX)
    check(trace, str(file))
    numbers = {phase: number for number, phase in PHASES.items()}
    arrays: dict[str, npt.NDArray[Any]] = {
        "header": np.array(json.dumps(_header(trace), sort_keys=True)),
        "requests": np.array([step.request for step in trace.steps], dtype=np.int32),
        "phases": np.array([numbers[step.phase] for step in trace.steps], dtype=np.uint8),
        "num_tokens": np.array([step.num_tokens for step in trace.steps], dtype=np.int32),
        "experts": trace.experts.astype(_id_type(trace.num_experts)),
        "weights": trace.weights.astype(np.float32),
    }
    for name in OPTIONAL:
        array = getattr(trace, name)
        if array is not None:
            kind = _id_type(trace.num_experts) if name == "predicted" else np.float32
            arrays[name] = array.astype(kind)
    partial = file.with_name(file.name + ".part")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    partial.replace(file)
    return file


def read_trace(path: str | Path) -> Trace:
    """Read a trace of either format, told apart by content."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            magic = stream.read(2)
    except OSError as error:
        raise ConfigError(f"{file}: the trace cannot be opened ({error.strerror})") from None
    return _read_npz(file) if magic == _ZIP_MAGIC else read_csv(file)


def _read_npz(file: Path) -> Trace:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(str(arrays["header"]))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"{file}: not a {FORMAT} file ({error})") from None
    if header.get("format") != FORMAT:
        raise ConfigError(f"{file}: wrong header: format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("version") != VERSION:
        raise ConfigError(
            f"{file}: version {header.get('version')!r} of {FORMAT}; this package reads version {VERSION}"
        )
    try:
        return check(_assemble(header, arrays), str(file))
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{file}: wrong header: {error} is missing or of the wrong kind") from None


def _assemble(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Trace:
    def optional(name: str) -> npt.NDArray[Any] | None:
        return None if name not in arrays else arrays[name].astype(np.int16 if name == "predicted" else np.float32)

    return Trace(
        model=header["model"],
        layers=tuple(header["layers"]),
        num_experts=header["num_experts"],
        expert_bytes=tuple(header["expert_bytes"]),
        steps=make_steps(
            arrays["requests"].tolist(), [PHASES[int(p)] for p in arrays["phases"]], arrays["num_tokens"].tolist()
        ),
        experts=arrays["experts"].astype(np.int16),
        weights=arrays["weights"].astype(np.float32),
        scores=optional("scores"),
        predicted=optional("predicted"),
        predicted_scores=optional("predicted_scores"),
        source=header["source"],
    )


def _header(trace: Trace) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": trace.model,
        "layers": list(trace.layers),
        "num_experts": trace.num_experts,
        "expert_bytes": list(trace.expert_bytes),
        "source": trace.source,
    }


def _id_type(num_experts: int) -> type[np.signedinteger[Any]]:
    """-1 marks an absent token, so a signed byte reaches 128 experts."""
    return np.int8 if num_experts <= 128 else np.int16
