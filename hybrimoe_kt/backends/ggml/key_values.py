"""Keys and values of one layer and one conversation, as graphs read them, in memory that grows in steps."""

from __future__ import annotations

import torch

from hybrimoe_kt.kv_cache_types import check_kv_cache_type
from hybrimoe_kt.quants import row_bytes

from .building import Region
from .library import F16, F32, Q8_0
from .products import dequantize_into, quantize

__all__ = ["GGML_TYPES", "KeyValues"]

GGML_TYPES = {"auto": F16, "f16": F16, "f32": F32, "q8_0": Q8_0}
"""Those of `kv_cache_types` that graphs read, by their names there."""
_DTYPES = {F16: torch.float16, F32: torch.float32}
_LEAST_TOKENS = 256
_GROWTH = 1.25
"""Room made at a time: at least so many tokens, or this share of what is there, in whole multiples of 256. A choice."""


class KeyValues:
    """Keys `[tokens, key_width]`, values `[value_width, tokens]`, or `[tokens, value_width]` of blocks.

    Values across tokens are what a product with probabilities reads in a row; blocks cannot be written so.
    """

    def __init__(self, key_width: int, value_width: int, type_name: str = "f16") -> None:
        check_kv_cache_type(type_name, GGML_TYPES)
        self.ggml_type = GGML_TYPES[type_name]
        self.key_width, self.value_width = key_width, value_width
        self.is_transposed = self.ggml_type in _DTYPES
        self.length = self.capacity = 0
        """Tokens held, and how many there is memory for."""
        self.keys, self.values = (Region(memory) for memory in self._memory(0))

    @property
    def regions(self) -> tuple[Region, Region]:
        """What graphs read and write."""
        return self.keys, self.values

    @property
    def place(self) -> int:
        """Where the next token's are written."""
        return self.length

    @property
    def facts(self) -> tuple[int, int, int, int]:
        """Addresses of keys and values, where the next token's are written, and tokens that there is memory for."""
        return self.keys.address, self.values.address, self.length, self.capacity

    def advance(self, tokens: int) -> None:
        """Hold so many more, which a graph has written behind `length`."""
        self.length += tokens

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self.capacity * sum(row_bytes(self.ggml_type, width) for width in (self.key_width, self.value_width))

    def reserve(self, num_tokens: int) -> None:
        """Have memory for so many tokens; what is held stays."""
        if num_tokens <= self.capacity:
            return
        wanted = max(num_tokens, int(self.capacity * _GROWTH), _LEAST_TOKENS)
        capacity = -(-wanted // _LEAST_TOKENS) * _LEAST_TOKENS
        keys, values = self._memory(capacity)
        keys[: self.length] = self.keys.memory[: self.length]
        if self.is_transposed:
            values[:, : self.length] = self.values.memory[:, : self.length]
        else:
            values[: self.length] = self.values.memory[: self.length]
        self.keys.replace(keys)
        self.values.replace(values)
        self.capacity = capacity

    @torch.inference_mode(False)
    def _memory(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros, as what is not a number would spoil a sum even with a probability of zero."""
        dtype = _DTYPES.get(self.ggml_type)
        if dtype is not None:
            keys = torch.zeros(num_tokens, self.key_width, dtype=dtype)
            return keys, torch.zeros(self.value_width, num_tokens, dtype=dtype)
        widths = (row_bytes(self.ggml_type, width) for width in (self.key_width, self.value_width))
        keys, values = (torch.zeros(num_tokens, width, dtype=torch.uint8) for width in widths)
        return keys, values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take more tokens: keys float32 `[tokens, key_width]`, values float32 `[tokens, value_width]`."""
        first, end = self.length, self.length + len(keys)
        self.reserve(end)
        if self.is_transposed:
            self.keys.memory[first:end] = keys
            self.values.memory[:, first:end] = values.t()
        else:
            self.keys.memory[first:end] = quantize(keys, self.ggml_type)
            self.values.memory[first:end] = quantize(values, self.ggml_type)
        self.length = end

    def read_keys(self) -> torch.Tensor:
        """All keys held, float32 `[tokens, key_width]`."""
        if self.is_transposed:
            return self.keys.memory[: self.length].float()
        return self._dequantized(self.keys, self.key_width)

    def read_values(self) -> torch.Tensor:
        """All values held, float32 `[value_width, tokens]`."""
        if self.is_transposed:
            return self.values.memory[:, : self.length].float()
        return self._dequantized(self.values, self.value_width).t()

    def _dequantized(self, region: Region, width: int) -> torch.Tensor:
        out = torch.empty(self.length, width)
        if self.length:
            dequantize_into(region.address, self.ggml_type, self.length, width, out)
        return out

    def crop(self, length: int) -> None:
        """Forget what is behind `length` tokens; the memory stays."""
        self.length = min(self.length, length)
