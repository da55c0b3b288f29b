"""Model files on the host: GGUF and safetensors, their experts, and dense tensors that are read when wanted."""
