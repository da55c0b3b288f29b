"""Whether the program is right on a GPU, and how fast: `python -m benchmarks.on_gpu`, a module for each step."""
