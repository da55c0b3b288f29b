"""What every engine that owns batching and parallelism needs of us, and no engine's name: `host.vllm`, `host.sglang`."""
