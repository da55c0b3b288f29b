"""What the model did after earlier tokens that looked like this one: the adaptive policy's evidence.

Counts live in the 16-bit fields of big integers, so one addition updates a whole window of tokens or a whole
layer of experts: plain CPython does per layer in a microsecond what a loop would do in fifty.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

_FIELD_BITS = 16
_UNIT = 64  # one shared expert; top-k x _UNIT x 4 must stay below 2^16, true up to top-255
_TOTAL_WEIGHT = 1023  # of all similar tokens together; x sum(_AHEAD) must stay below 2^16
_AHEAD = (25, 15, 9, 5)  # 0.6^k: what an expert's use k + 1 tokens later counts
FULL_VOTE = float(_TOTAL_WEIGHT * sum(_AHEAD))


class TokenContext:
    """A ring of one sequence's last tokens and how much each resembles the current one; shared by all layers.

    Resemblance counts the experts two tokens share, layer by layer; each layer fades what earlier layers
    found to three quarters. Votes are what the followers of the `num_similar` most alike tokens used, one to
    four tokens later.
    """

    def __init__(
        self, layers: Sequence[int], *, num_experts: int, window_tokens: int, num_similar: int, refresh_layers: int
    ) -> None:
        self._position = {layer: index for index, layer in enumerate(layers)}
        self._window, self._num_similar, self._refresh_layers = window_tokens, num_similar, refresh_layers
        bits = _FIELD_BITS * window_tokens
        self._top_field = bits - _FIELD_BITS
        self._all = (1 << bits) - 1
        self._fade_mask = int.from_bytes(b"\xff\x3f" * window_tokens, "little")
        self._unit = [_UNIT << (_FIELD_BITS * token) for token in range(window_tokens)]
        self._expert_unit = [1 << (_FIELD_BITS * expert) for expert in range(num_experts)]
        self._uses = {layer: [0] * num_experts for layer in layers}  # by expert: fields of the tokens that used it
        self._routed: dict[int, list[Collection[int]]] = {layer: [()] * window_tokens for layer in layers}
        self._after = {layer: [0] * window_tokens for layer in layers}  # by token: fields of experts used after it
        self._vote_bytes, self._vote_format = 2 * num_experts, f"<{num_experts}H"
        self._window_format = f"<{window_tokens}H"
        self._alike = 0
        self._token = 0
        self._last_position = -1
        self._resemblance = 0  # `alike` when the similar tokens were last to be chosen
        self._similar: list[tuple[int, int]] | None = []

    def observe(self, layer: int, experts: Collection[int]) -> None:
        """Take in what the current token routed to in `layer`; a layer not after the last one starts a new token."""
        position = self._position[layer]
        if position <= self._last_position:
            self._next_token()
        self._last_position = position
        token = self._token
        uses, unit, expert_unit = self._uses[layer], self._unit[token], self._expert_unit
        for expert in self._routed[layer][token]:
            uses[expert] -= unit
        alike = self._alike
        alike -= (alike >> 2) & self._fade_mask
        self._alike = alike = sum(map(uses.__getitem__, experts), alike)
        for expert in experts:
            uses[expert] += unit
        used = sum(map(expert_unit.__getitem__, experts))
        self._routed[layer][token] = experts
        after, window = self._after[layer], self._window
        after[token] = 0
        for distance, weight in enumerate(_AHEAD, 1):
            after[(token - distance) % window] += weight * used
        if position % self._refresh_layers == 0:
            self._resemblance, self._similar = alike, None  # chosen when somebody asks

    def votes(self, layer: int) -> tuple[int, ...]:
        """Return per expert how strongly it is expected within four tokens; `FULL_VOTE` is certainty in each."""
        after, similar = self._after[layer], self._similar
        if similar is None:
            similar = self._similar = self._choose_similar()
        total = sum([weight * after[token] for token, weight in similar])
        return struct.unpack(self._vote_format, total.to_bytes(self._vote_bytes, "little"))

    def _next_token(self) -> None:
        """Move on: what resembled the last token is, one step later, where this one is looked for."""
        token = self._token = (self._token + 1) % self._window
        alike = self._alike
        alike = ((alike << _FIELD_BITS) & self._all) | (alike >> self._top_field)
        self._alike = alike - (alike & (0xFFFF << (_FIELD_BITS * token)))

    def _choose_similar(self) -> list[tuple[int, int]]:
        """Weigh the most similar tokens by the square of their resemblance."""
        values = struct.unpack(self._window_format, self._resemblance.to_bytes(2 * self._window, "little"))
        cut = max(sorted(values)[-self._num_similar], 4)
        best = [(token, value) for token, value in enumerate(values) if value >= cut]
        total = sum([value * value for _, value in best])
        return [(token, _TOTAL_WEIGHT * value * value // total) for token, value in best]
