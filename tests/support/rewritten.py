"""A GGUF file with other metadata and tensors, as other converters and their mistakes would have written it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

__all__ = ["Tensors", "Value", "rewritten"]

Value = tuple[Any, GGUFValueType] | None
"""A metadata value and its type, of the items where it is a list; None leaves the key out."""
Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]


def rewritten(
    path: Path,
    out: Path,
    metadata: Mapping[str, Value] | None = None,
    tensors: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> Path:
    """Copy a file to `out` with these keys in the place of its own, and what `tensors` makes of its tensors."""
    reader, changes = gguf.GGUFReader(str(path)), dict(metadata or {})
    writer = gguf.GGUFWriter(str(out), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changes:
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=item)
    for key, value in changes.items():
        if value is not None and isinstance(value[0], list):
            writer.add_key_value(key, value[0], GGUFValueType.ARRAY, sub_type=value[1])
        elif value is not None:
            writer.add_key_value(key, *value)
    found = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    for name, (data, kind) in tensors(found).items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
