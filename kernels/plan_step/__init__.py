"""One token's step of a layer: which experts are computed where, which are brought, and who loses a slot."""

from .kernel import plan_step
from .naive import naive_plan_step

__all__ = ["naive_plan_step", "plan_step"]
