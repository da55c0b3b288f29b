"""The model that a configuration describes: Transformers' own, or put together where its own also sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["language_model"]


def language_model(config: Any) -> Any:
    """Build the model with random weights, or on the device that is set; raises whatever Transformers does."""
    from transformers import AutoModelForCausalLM

    own = _OWN.get(config.model_type)
    return AutoModelForCausalLM.from_config(config) if own is None else own()._from_config(config)


@functools.cache
def _step() -> Any:
    """Step-3.5 and 3.7: the text model with a head."""
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel

    class Step3p5ForCausalLM(Step3p7PreTrainedModel):
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  # as Transformers has it

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Step3p7TextModel(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()  # type: ignore[no-untyped-call]

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            cache: Any = None,
            logits_to_keep: int | torch.Tensor = 0,
            **kwargs: Any,
        ) -> CausalLMOutputWithPast:
            """Logits `[batch, tokens, vocab]`, of the last `logits_to_keep` tokens if that is not 0."""
            kept = kwargs if cache is None else {**kwargs, "cache": cache}
            found = self.model(input_ids=input_ids, **kept)
            wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return CausalLMOutputWithPast(logits=self.lm_head(found.last_hidden_state[:, wanted, :]))

    return Step3p5ForCausalLM


_OWN: dict[str, Callable[[], Any]] = {"step3p5": _step}
"""By what Transformers calls the type of the text model."""
