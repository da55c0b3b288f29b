"""ggml's CPU kernels, reached through its C interface: every GGUF type where it stands in the file, of any width."""
