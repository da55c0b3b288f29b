"""Linear layers of a few rows of activations, up to three that share them in one launch."""

from .kernel import linear_few
from .naive import naive_linear_few

__all__ = ["linear_few", "naive_linear_few"]
