"""What things are called between SGLang and us."""

from hybrimoe_kt.host.engines.quantization import METHOD as METHOD

OPTIONS_KEY = "hybrimoe"
"""Of --model-loader-extra-config: options as of `ExpertOptions`."""
FILE_KEY = "hybrimoe_file"
"""Of the same: the model's own file or directory, where weights are read; set here."""
