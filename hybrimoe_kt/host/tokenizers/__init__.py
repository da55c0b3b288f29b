"""The tokenizer that a GGUF file describes, rebuilt with the tokenizers library."""
