"""Text in, text out: from files to a model that answers, its tokens drawn and turned back into text."""

from hybrimoe_kt.host.hf import versions as _checked  # noqa: F401  an unsuitable Transformers is refused here, too
