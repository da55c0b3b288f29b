"""A linear layer of many rows of activations."""

from .kernel import linear_many
from .naive import naive_linear_many

__all__ = ["linear_many", "naive_linear_many"]
