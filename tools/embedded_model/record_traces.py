"""Records the embedded model's routing on held-out text, one file a kind of text, with `hybrimoe trace`.

python -m tools.embedded_model.record_traces --data .cache/corpus --out hybrimoe_kt/models/traces
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from hybrimoe_kt.cli import trace
from hybrimoe_kt.models import embedded_model

from .evaluate import held_out_texts

# part of the corpus -> name of the trace
KINDS = {"generated": "dialogue", "chitchat": "chitchat", "austen": "novel"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--tokens", type=int, default=640, help="of each text (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = held_out_texts(arguments.data)
    for part, name in KINDS.items():
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write("<|endoftext|>".join(["", *texts[part]])[: 8 * arguments.tokens])
            file.flush()
            given = ["--gguf_path", str(arguments.model), "--text", file.name, "--tokens", str(arguments.tokens)]
            code = trace.main([*given, "--accelerator", "none", "--out", str(arguments.out / f"{name}.npz")])
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
