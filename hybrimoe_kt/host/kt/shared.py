"""What all layers of a model share, kept on the legacy framework's loader: all of them are given it."""

from __future__ import annotations

from typing import Any

from hybrimoe_kt.runtime import ModelExperts, Runtime, assemble

__all__ = ["Shared"]


class Shared:
    """The experts that layers have brought, and the runtime that the first step makes of them."""

    def __init__(self) -> None:
        self.experts = ModelExperts()
        self._runtime: Runtime | None = None

    @classmethod
    def by(cls, loader: Any) -> Shared:
        """Return what is kept on `loader`, or begin."""
        found: Shared | None = getattr(loader, "hybrimoe_shared", None)
        if found is None:
            found = loader.hybrimoe_shared = cls()
        return found

    @property
    def runtime(self) -> Runtime:
        """Assembled when first asked for: the framework does not say when all layers are loaded."""
        if self._runtime is None:
            self._runtime = assemble(self.experts)
        return self._runtime
