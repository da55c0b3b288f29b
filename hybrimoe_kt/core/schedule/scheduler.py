"""What every scheduler promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from hybrimoe_kt.core.policies.base import check_options

from .base import Assignment, Task


class Scheduler(ABC):
    """Assigns each routed expert to the CPU, to the GPU, or to a transfer followed by the GPU. Stateless."""

    name: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    """Option name -> default."""

    def __init__(self, **options: Any) -> None:
        self.option = check_options(f"scheduler {self.name or type(self).__name__}", options, self.options)

    @abstractmethod
    def assign(self, task: Task) -> Assignment:
        """Return the assignment of `task`; the same task gives the same answer."""

    def makespan_s(self, task: Task) -> float:
        """Return the makespan of `assign`, for those who want nothing else of it."""
        return self.assign(task).makespan_s
