"""Pure policy: standard library only, deterministic, no clock, no threads, no tensors."""
