"""Hugging Face Transformers as the host: GGUF in, model out."""
