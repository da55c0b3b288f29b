"""Finds llama.cpp's published converter outside the repository: an oracle for what GGUF files look like.

Looked for in the environment variable HYBRIMOE_LLAMA_CPP (a checkout of llama.cpp), then in `.cache/llama.cpp`, where
`python tests/host/llama_cpp_converter.py` puts it: the source distribution of llama-cpp-python carries it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

RELEASE = "0.3.36"
CACHE = Path(__file__).parents[2] / ".cache" / "llama.cpp"
CONVERTER, LIBRARY = Path("conversion"), Path("gguf-py", "gguf")
MISSING = f"no llama.cpp converter: set HYBRIMOE_LLAMA_CPP or run python {Path(__file__).name}"


def find() -> Path | None:
    """Return the folder that holds `conversion/` and `gguf-py/`, None when there is none."""
    named = os.environ.get("HYBRIMOE_LLAMA_CPP")
    candidates = [*([Path(named)] if named else []), CACHE]
    return next((root for root in candidates if (root / CONVERTER).is_dir() and (root / LIBRARY).is_dir()), None)


def convert(folders: Iterable[Path], root: Path, kind: str = "ALL_F32") -> None:
    """Write `model.gguf` into each Hugging Face directory, in a process of its own; `kind` is of the converter."""
    script = str(Path(__file__).with_name("convert_models.py"))
    command = [sys.executable, script, str(root), kind, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def fetch() -> Path:
    """Download the source distribution and unpack the converter and its library into the cache."""
    with TemporaryDirectory() as folder:
        options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder)
        command = (sys.executable, "-m", "pip", "download", "--quiet", *options, f"llama-cpp-python=={RELEASE}")
        subprocess.run(command, check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as source:
            for member in source:
                _, _, inside = member.name.partition("/vendor/llama.cpp/")
                wanted = any(Path(inside).is_relative_to(part) for part in (CONVERTER, LIBRARY))
                if member.isfile() and wanted:
                    target = CACHE / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.extractfile(member).read())
    return CACHE


if __name__ == "__main__":
    print(find() or fetch())
