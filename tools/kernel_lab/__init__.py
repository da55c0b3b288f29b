"""Judges kernels without a GPU: compiles every configuration for every target and reads the machine code."""
