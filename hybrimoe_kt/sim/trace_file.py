"""The compact trace format: one zip of NumPy arrays (`.npz`) with a JSON header, version 1.

`header` (a string array) holds `format`, `version`, `model`, `layers`, `num_experts`, `expert_bytes`, `source`;
`requests`, `phases` (0 prefill, 1 decode) and `num_tokens` have one entry per step; `experts`, `weights` and the
optional `scores`, `predicted`, `predicted_scores` are shaped as in `Trace`. A replayed trace must decide exactly as the
recorded run did, so probabilities are written in half precision only where that loses nothing: a recording rounds them
before anything is decided. `token_scores` holds the tokens of steps of more than one; a lone token's are its step's
`scores`. The header's optional `run` says how the recorded run was configured and what it counted. The same trace
always gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe_kt.errors import ConfigError

from .trace import Step, Trace, check, make_steps
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
            arrays[name] = array.astype(_id_type(trace.num_experts)) if name == "predicted" else _compact(array)
    if trace.token_scores is not None:
        arrays["token_scores"] = trace.token_scores[_in_batches(trace.steps, trace.scores is not None)]
    partial = file.with_name(file.name + ".part")
    try:
        with partial.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigError(f"{file}: the trace cannot be written ({error.strerror}); name a writable file") from None
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
    except (KeyError, ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{file}: not a {FORMAT} file ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise ConfigError(f"{file}: wrong header: format {found!r}, expected {FORMAT!r}")
    if header.get("version") != VERSION:
        raise ConfigError(
            f"{file}: version {header.get('version')!r} of {FORMAT}; this package reads version {VERSION}"
        )
    try:
        return check(_assemble(header, arrays), str(file))
    except ConfigError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file}: wrong header: {error} is missing or of the wrong kind") from None


def _assemble(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Trace:
    def optional(name: str) -> npt.NDArray[Any] | None:
        return None if name not in arrays else arrays[name].astype(np.int16 if name == "predicted" else np.float32)

    steps = make_steps(
        arrays["requests"].tolist(), [PHASES[int(p)] for p in arrays["phases"]], arrays["num_tokens"].tolist()
    )
    return Trace(
        model=header["model"],
        layers=tuple(header["layers"]),
        num_experts=header["num_experts"],
        expert_bytes=tuple(header["expert_bytes"]),
        steps=steps,
        experts=arrays["experts"].astype(np.int16),
        weights=arrays["weights"].astype(np.float32),
        scores=optional("scores"),
        predicted=optional("predicted"),
        predicted_scores=optional("predicted_scores"),
        token_scores=_token_scores(arrays, steps),
        run=dict(header.get("run", {})),
        source=header["source"],
    )


def _compact(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Half precision where every number survives it, else single."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array.astype(np.float32)


def _in_batches(steps: Sequence[Step], has_scores: bool) -> npt.NDArray[np.bool_]:
    """Which tokens' own scores must be written: `[num_tokens]`."""
    counts = np.array([step.num_tokens for step in steps])
    return np.repeat(counts > 1, counts) if has_scores else np.ones(int(counts.sum()), dtype=bool)


def _token_scores(arrays: dict[str, npt.NDArray[Any]], steps: Sequence[Step]) -> npt.NDArray[np.float16] | None:
    """Put a lone token's scores, which are its step's, back among those of batches."""
    if "token_scores" not in arrays:
        return None
    written, scores = arrays["token_scores"].astype(np.float16), arrays.get("scores")
    batched = _in_batches(steps, scores is not None)
    result = np.empty((len(batched), *written.shape[1:]), dtype=np.float16)
    result[batched] = written
    if scores is not None:
        result[~batched] = scores[[step.num_tokens == 1 for step in steps]]
    return result


def _header(trace: Trace) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": trace.model,
        "layers": list(trace.layers),
        "num_experts": trace.num_experts,
        "expert_bytes": list(trace.expert_bytes),
        "source": trace.source,
    } | ({"run": dict(trace.run)} if trace.run else {})


def _id_type(num_experts: int) -> type[np.signedinteger[Any]]:
    """-1 marks an absent token, so a signed byte reaches 128 experts."""
    return np.int8 if num_experts <= 128 else np.int16
