"""What every engine that owns batching and parallelism needs of us; the engines are `host.vllm` and `host.sglang`."""
