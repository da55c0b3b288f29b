"""Device functions that read GGUF blocks from a slot: `units` for matrix-vector, `tiles` for matrix-matrix kernels."""
