"""Hugging Face Transformers as the host: a GGUF file or a checkpoint in, a model out."""

from .versions import check_transformers

check_transformers()
