"""Stands in for the framework's CUDA kernels, which it imports even where it uses none."""
