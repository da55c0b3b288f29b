"""What one run is to do: the command line as data, the steps in order, and how long each may take."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

__all__ = ["MODELS", "Plan", "Step", "environment", "steps_of", "visible_card"]

MODELS = ("qwen3-30b-a3b", "deepseek-v2-lite", "mixtral-8x7b")
"""Generated on the spot, in this order: the first gets most of the time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The command line; handed from process to process in the results file."""

    accelerator: str
    """"cuda", of which steps see the one card that was named, or "emulated"."""
    card: str = ""
    """That one, as a setting of the environment, see `visible_card`; empty: as the environment has it."""
    models: tuple[str, ...] = MODELS
    out: str = ".cache/on_gpu"
    minutes: float = 8.0
    quick: bool = False
    keep_model: bool = False
    llama_bench: str = ""

    @property
    def is_emulated(self) -> bool:
        """Then shapes are tiny, and times mean nothing."""
        return self.accelerator.startswith("emulated")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        return cls(**(values | {"models": tuple(values["models"])}))


@dataclass(frozen=True, slots=True)
class Step:
    """One process. It may take `share` of the time that is left when it begins, at most `most_s` seconds.

    With less than `least_s` it is not begun.
    """

    kind: str
    title: str
    share: float
    least_s: float
    most_s: float
    model: str = ""

    @property
    def name(self) -> str:
        """What `--step` takes and rows carry."""
        return f"{self.kind}:{self.model}" if self.model else self.kind

    def limit_s(self, left_s: float) -> float:
        """Seconds it may take, 0 if it is not worth beginning."""
        limit = min(self.most_s, self.share * left_s)
        return limit if limit >= self.least_s else 0.0


def steps_of(plan: Plan) -> list[Step]:
    """All steps of a run, in order."""
    tests, link, kernels = (25, 12, 20) if plan.quick and not plan.is_emulated else (240, 60, 120)
    steps = [
        Step("machine", "the machine", 0.2, 5, 20),
        Step("tests", "is it right: the project's tests", 0.3, 10, tests),
        Step("link", "the link", 0.2, 10, link),
        Step("kernels", "the kernels", 0.25, 12, kernels),
    ]
    for number, model in enumerate(plan.models):
        is_last = number == len(plan.models) - 1
        share, least = (0.85 if is_last else 0.5), (15 if plan.is_emulated else 25)
        steps.append(Step("model", f"{model}, the whole model", share, least, 900, model))
        steps.append(Step("llama", f"{model}, llama.cpp on the same file", 0.3, 5, 120, model))
    return [*steps, Step("clock", "plans on the clock", 1.0, 5 if plan.is_emulated else 30, 240)]


def visible_card(number: int) -> str:
    """What lets a process see only the card that this one counts as `number`: "CUDA_VISIBLE_DEVICES=2"."""
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):  # ROCm heeds the second where the first is missing
        listed = [card.strip() for card in os.environ.get(name, "").split(",") if card.strip()]
        if number < len(listed):
            return f"{name}={listed[number]}"
    return f"CUDA_VISIBLE_DEVICES={number}"


def environment(plan: Plan) -> dict[str, str]:
    """What the steps' processes are started with: one card, no network, no progress bars.

    Triton's interpreter without a card.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if plan.card:  # tests, graphs and llama.cpp take the current card, or all they see
        name, _, value = plan.card.partition("=")
        found[name] = value
    if plan.is_emulated:  # tiny products: a second thread costs more than it brings
        found |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return found
