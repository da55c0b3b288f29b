"""What tests and benchmarks share: random models and blocks, the format of a timeline, Triton's interpreter."""
