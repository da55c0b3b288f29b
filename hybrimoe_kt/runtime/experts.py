"""A model's routed experts as a runtime is made of them: gathered layer by layer, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.memory_plan import MemoryPlan
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.errors import ConfigError

__all__ = ["ModelExperts"]


class ModelExperts:
    """Every MoE layer's experts on the host, the options they share, and each layer's accelerator."""

    def __init__(self, options: ExpertOptions | None = None, overrides: Mapping[str, Any] | None = None) -> None:
        """`options` may come with the first layer, see `agree`; `overrides` are keys that win over all of them."""
        self._overrides = dict(overrides or {})
        self._options = None if options is None else options.replace(self._overrides)
        self.store = HostStore()
        self.accelerator_of: dict[int, str] = {}
        self.plans: Mapping[str, MemoryPlan] = {}
        """Accelerator's name -> what else its card has to hold; without one a guess is left free."""
        self.is_share = False
        """Whether other ranks of an engine have further experts of these layers: pairs of id -1 are then theirs."""

    @property
    def options(self) -> ExpertOptions:
        """What all layers share; the defaults while nobody said anything."""
        return self._options or ExpertOptions().replace(self._overrides)

    def agree(self, options: ExpertOptions, owner: str) -> ExpertOptions:
        """Return a layer's options with the overrides in them; ConfigError names `owner` if an earlier layer's differ.

        Layers may differ in `accelerator`.
        """
        options = options.replace(self._overrides)
        if self._options is None:
            self._options = options
        elif self._options != options.replace({"accelerator": self._options.accelerator}):
            raise ConfigError(
                f"{owner}: its expert options differ from an earlier layer's; all MoE layers share one set"
            )
        return options

    def add(self, experts: LayerExperts, accelerator: str | None = None) -> None:
        """Take a layer's experts, and the name of its accelerator where that is not `options.accelerator`.

        ConfigError for a layer that is there already.
        """
        if experts.layer in self.accelerator_of:
            raise ConfigError(f"layer {experts.layer} has been added already; a model's layers have different numbers")
        self.store.add(experts)
        self.accelerator_of[experts.layer] = accelerator or self.options.accelerator

    def replace(self, changes: Mapping[str, Any]) -> ModelExperts:
        """The same experts on the same host memory, with other options."""
        other = ModelExperts(self.options, changes)
        other.store, other.accelerator_of, other.plans = self.store, dict(self.accelerator_of), self.plans
        other.is_share = self.is_share
        if "accelerator" in changes:
            other.accelerator_of = dict.fromkeys(self.accelerator_of, other.options.accelerator)
        return other
