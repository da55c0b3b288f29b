"""What things are called between vLLM and us."""

from hybrimoe_kt.host.engines.quantization import METHOD as METHOD

OPTIONS_KEY = "hybrimoe"
"""Of --additional-config: options as of `ExpertOptions`."""
FILE_KEY = "hybrimoe_file"
"""Of the same: the model's own file or directory, where weights are read; set here."""
TOKENIZER_MODE = "hybrimoe"
OP = "hybrimoe_experts"
SPLITTING_OP = f"vllm::{OP}"
