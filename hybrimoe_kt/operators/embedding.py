"""`QuantizedEmbedding`: an embedding that stays as the file has it; what is looked up is dequantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml.products import dequantize_into
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.device.packed import PackedWeight
from hybrimoe_kt.errors import ConfigError

__all__ = ["QuantizedEmbedding"]


_FACTOR = "scalar_embed_scale"
"""What Transformers' embeddings have that multiply what is looked up."""


class QuantizedEmbedding(nn.Module):
    """In place of `torch.nn.Embedding`, or one with a factor: the table stays in host memory, where the file is mapped.

    On an accelerator rows are looked up and dequantised on the CPU, and only they cross the link.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str = "cpu",
    ) -> None:
        super().__init__()
        if type(orig_module) is not nn.Embedding and not hasattr(orig_module, _FACTOR):
            raise ConfigError(
                f"{key}: QuantizedEmbedding replaces torch.nn.Embedding, found {type(orig_module).__name__}"
            )
        assert isinstance(orig_module, nn.Embedding), "also with a factor"
        self._factor = float(getattr(orig_module, _FACTOR, 1.0))
        self._rounded: dict[torch.dtype, float] = {}
        self.num_embeddings, self.embedding_dim = orig_module.num_embeddings, orig_module.embedding_dim
        self._packed: PackedWeight | None = None
        self._device = device_at(generate_device)
        if hasattr(gguf_loader, "packed_weight") and self._device.type != "meta":
            shape = self.num_embeddings, self.embedding_dim
            self._packed = gguf_loader.packed_weight(f"{key}.weight", shape)
        # a model that asks where its table stands is told nowhere, and then leaves ids where they are
        self.weight = orig_module.weight if self._packed is None else orig_module.weight.detach().to("meta")
        self._dtype = orig_module.weight.dtype
        self._by_ggml = ggml.unusable() is None

    @property
    def reads_on_host(self) -> bool:
        """Whether ids are best given on the CPU."""
        return self._packed is not None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids `[...]`, on any device -> `[..., embedding_dim]`, in the model's dtype, where the layers stand."""
        if self._packed is None:
            return self._scaled(functional.embedding(input, self.weight))
        (part,) = self._packed.parts
        rows = part.data.view(part.rows, -1)[input.flatten().cpu()]
        if self._by_ggml:
            values = torch.empty(len(rows), part.columns, device="cpu")
            dequantize_into(rows.data_ptr(), part.ggml_type, len(rows), part.columns, values)
        else:
            values = dequantize(rows.flatten(), part.ggml_type, (len(rows), part.columns))
        return self._scaled(values.to(self._dtype).to(self._device).view(*input.shape, part.columns))

    def _scaled(self, values: torch.Tensor) -> torch.Tensor:
        """By the factor as the dtype has it."""
        if self._factor == 1.0:
            return values
        if values.dtype not in self._rounded:
            self._rounded[values.dtype] = float(torch.tensor(self._factor, dtype=values.dtype, device="cpu"))
        return values * self._rounded[values.dtype]

    def extra_repr(self) -> str:
        kept = "float" if self._packed is None else self._packed.parts[0].name
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={kept}"
