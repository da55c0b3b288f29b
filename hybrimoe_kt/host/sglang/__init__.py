"""SGLang as the host, experimental: its batching, parallelism and prefix cache, our routed experts.

    sglang serve --model-path FILE.gguf --quantization hybrimoe \\
        --model-loader-extra-config '{"hybrimoe": {"cache_size": "12GiB"}}'

SGLang finds `register` by the entry point `sglang.srt.plugins` and calls it in each of its processes. Nothing changes
for models without that quantisation. It was compared with stock SGLang on its CPU backend only, never run on a GPU.

A step that fails ends its requests with an error 500, and what it wrote is kept out of the prefix cache (`steps`).
"""

from __future__ import annotations

__all__ = ["register"]

TRIED = ("0.5.23", "0.5.24")
"""The oldest version that works, and the first that was not tried."""


def register() -> None:
    """Add the quantisation method, the loader and what follows for other arguments."""
    from hybrimoe_kt.host.engines.versions import check_engine

    check_engine(("sglang",), *TRIED)
    from .arguments import extend_arguments
    from .loader import add_loader
    from .method import add_method

    add_method()
    add_loader()
    extend_arguments()
