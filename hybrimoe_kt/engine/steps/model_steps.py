"""Steps of a model: a piece of one conversation, or a token each of several, with what can go wrong on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from hybrimoe_kt.device.step_graph import CaptureError, StepLost
from hybrimoe_kt.device.unused_memory import give_back_unused, is_out_of_memory
from hybrimoe_kt.engine.memory.conversation import Conversation
from hybrimoe_kt.engine.memory.growing_cache import GrowingCache
from hybrimoe_kt.engine.vocabulary import num_token_ids
from hybrimoe_kt.errors import CapacityError, KernelError, first_line
from hybrimoe_kt.host.hf.loading import LoadedModel
from hybrimoe_kt.runtime import Runtime

from .captured_loop import CapturedLoop
from .captured_rows import CapturedRows
from .joint_rows import JointRows
from .layer_loop import LayerLoop
from .profiler import TimeShares
from .prompt_scores import PromptScores

__all__ = ["BROKEN", "MOST_LOST", "ModelSteps", "short_reason"]

logger = logging.getLogger(__name__)

_LONG_CONTEXT_TOKENS = 4096
"""From which on attention's reading of the cache takes longer than what its threads cost others: some 16 MB a layer of
Qwen3-30B-A3B. Estimated; at 512 tokens a second thread of torch's cost 40 % of the tokens a second on two cores."""
MOST_LOST = 4
"""Captured steps in a row that may be lost; by then the accelerator has been given up."""
BROKEN = "the model produced NaN or infinite logits; the weights or a backend are broken"


class ModelSteps:
    """Appends tokens to conversations, by whatever computes steps of that kind quickest."""

    def __init__(
        self,
        loaded: LoadedModel,
        new_cache: Callable[[], GrowingCache],
        shares: TimeShares | None = None,
        loop: LayerLoop | CapturedLoop | None = None,
    ) -> None:
        """`loop` computes steps of few tokens; without one Transformers' own modules do, as they do all others."""
        self._loaded, self._new_cache, self._shares, self.loop = loaded, new_cache, shares, loop
        self._rows: JointRows | None = None
        self.captured_rows: CapturedRows | None = None
        """What replays steps of several conversations, where they can be captured."""
        self.most_tokens = 0
        """Of all conversations together that there is memory for, as whoever admits them counts it."""
        self.spare_memory: Callable[[], bool] = lambda: False
        """Gives back what other conversations have on accelerators; whether there was anything."""

    @property
    def runtime(self) -> Runtime:
        """What computes the model's experts."""
        return self._loaded.runtime

    @torch.inference_mode()
    def append(
        self,
        conversation: Conversation,
        ids: Sequence[int],
        scores: PromptScores | None = None,
    ) -> torch.Tensor:
        """Append `ids`, in chunks; return the last token's logits `[vocab]`, float32 on the CPU, until the next step.

        Where an accelerator's memory runs out, expert caches shrink and
        everything that was held is computed again: some layers have the failed chunk, others have not. So it is
        where a captured step is lost.
        """
        began = time.perf_counter()
        whole, left, num_lost = [*conversation.ids, *ids], list(ids), 0
        while True:
            try:
                logits = self._append(conversation, left, scores)
                break
            except CaptureError as refused:
                self.capture_no_more(refused)
                self.begin_anew(conversation)
                left = whole
                continue
            except StepLost as lost:
                num_lost += 1
                if num_lost > MOST_LOST:
                    raise KernelError(str(lost)) from lost
                self.begin_anew(conversation)
                left = whole
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = short_reason(error)
            self.begin_anew(conversation)
            self.make_room(reason, len(whole))  # not above: the error's frames hold what the failed step allocated
            left = whole
            if scores is not None:
                scores.clear()
        if not logits.sum().isfinite():
            self.begin_anew(conversation)
            raise KernelError(BROKEN)
        if self._shares is not None:
            self._shares.step(len(ids), time.perf_counter() - began)
        return logits

    def _append(
        self,
        conversation: Conversation,
        ids: list[int],
        scores: PromptScores | None,
    ) -> torch.Tensor:
        step = self.runtime.options.max_chunk_tokens
        if scores is not None:
            step = min(step, scores.max_tokens(num_token_ids(self._loaded.model)))
        logits = torch.empty(0)
        for at in range(0, len(ids), step):
            piece = ids[at : at + step]
            # A failed chunk leaves an unknown number of layers updated: forget the tokens unless this completes.
            held, conversation.ids = conversation.ids, []
            length = len(held) + len(piece)
            by_loop = self.loop is not None and scores is None and self.loop.takes(len(piece), length)
            self._share_cores(len(piece), len(held), by_graphs=by_loop and isinstance(self.loop, LayerLoop))
            if self.loop is not None and by_loop:
                logits = self.loop.step(piece, conversation.cache)
            else:
                logits = self._by_modules(piece, conversation.cache, scores)
            held += piece
            conversation.ids = held
        return logits

    def _by_modules(self, piece: list[int], cache: GrowingCache, scores: PromptScores | None) -> torch.Tensor:
        """Append `piece` to the cache by Transformers' own loop over layers; the last token's logits."""
        kept = 1 if scores is None else 0  # 0 keeps those of every token
        given = {self._loaded.cache_name: cache}
        output = self._loaded.model(input_ids=self._tokens([piece]), use_cache=True, logits_to_keep=kept, **given)
        if scores is not None:
            scores.add(output.logits[0])
        logits: torch.Tensor = output.logits[0, -1].float().cpu()
        return logits

    def _tokens(self, rows: list[list[int]]) -> torch.Tensor:
        """Ids where the embedding reads them."""
        model = self._loaded.model
        reads_on_host = getattr(model.get_input_embeddings(), "reads_on_host", False)
        reads_on_host &= not self._loaded.architecture.layers_take_ids
        return torch.tensor(rows, device="cpu" if reads_on_host else model.device)

    def _share_cores(self, num_tokens: int, num_held: int, *, by_graphs: bool) -> None:
        """Give torch one thread for single tokens: its second would spin on after each of many small operations.

        On a core that the experts' threads want meanwhile. Long contexts are worth it again, but not beside graphs.
        """
        is_small = num_tokens == 1 and num_held < _LONG_CONTEXT_TOKENS
        wanted = 1 if is_small or by_graphs else self.runtime.num_dense_threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    # Several conversations.

    def memory_tokens(self, lengths: Sequence[int]) -> int:
        """For how many tokens there is to be memory, that conversations of these lengths can step together."""
        if len(lengths) < 2 or isinstance(self.loop, LayerLoop) or not self._can_be_rows:
            return sum(lengths)
        return len(lengths) * max(lengths)

    @cached_property
    def _can_be_rows(self) -> bool:
        return JointRows.may_take(self._loaded, self._new_cache())

    @torch.inference_mode()
    def together(self, conversations: Sequence[Conversation], ids: Sequence[int]) -> torch.Tensor | None:
        """Append one token to each; logits float32 `[len(ids), vocab]` on the CPU, valid until the next step.

        None, having done nothing, where this model's steps are of one conversation. Whatever is raised leaves all of
        them in doubt: they hold nothing then. Rows may hold what is not finite.
        """
        began = time.perf_counter()
        caches = [conversation.cache for conversation in conversations]
        held = [conversation.ids for conversation in conversations]
        by_loop = isinstance(self.loop, LayerLoop) and self.loop.takes_together(len(ids), max(map(len, held)) + 1)
        are_rows = self._rows is not None and self._rows.holds(caches)
        if not by_loop and not are_rows and not JointRows.takes(self._loaded, caches):
            return None
        for conversation in conversations:
            conversation.ids = []
        self._share_cores(1, sum(map(len, held)), by_graphs=by_loop)
        if by_loop and isinstance(self.loop, LayerLoop):
            logits: torch.Tensor = self.loop.step_together(ids, caches)
        else:
            logits = self._by_rows(ids, caches)
        for conversation, before, token in zip(conversations, held, ids, strict=True):
            before.append(token)
            conversation.ids = before
        if self._shares is not None:
            self._shares.step(len(ids), time.perf_counter() - began)
        return logits

    def _by_rows(self, ids: Sequence[int], caches: Sequence[GrowingCache]) -> torch.Tensor:
        """A step as a batch of rows; where it cannot be captured, or a replay is lost, the rows are in doubt."""
        if self._rows is None:
            self._rows = JointRows(lambda: self.most_tokens)
        if self.captured_rows is None and CapturedRows.takes(self._loaded, self.loop):
            assert isinstance(self.loop, CapturedLoop), "it says so"
            self.captured_rows = CapturedRows(self._loaded, self.loop)
        captured = self.captured_rows if isinstance(self.loop, CapturedLoop) else None
        with self.runtime.in_phase("decode"):
            return self._rows.step(self._loaded, self._tokens([[token] for token in ids]), caches, captured)

    def rest(self) -> None:
        """Let go of the memory of rows: nobody steps."""
        if self._rows is not None:
            self._rows = None
            if self.captured_rows is not None:
                self.captured_rows.forget()

    # What goes wrong.

    def forget(self) -> None:
        """Let go of what was captured, and its memory."""
        if isinstance(self.loop, CapturedLoop):
            self.loop.forget()
        if self.captured_rows is not None:
            self.captured_rows.forget()

    def begin_anew(self, conversation: Conversation) -> None:
        """Forget a conversation, and let go of its memory."""
        self.forget()
        conversation.begin_anew(self._new_cache())

    def capture_no_more(self, refused: CaptureError) -> None:
        """Ask the modules for every step to come; a conversation was left half done."""
        assert isinstance(self.loop, CapturedLoop), "nobody else captures"
        logger.warning("steps are not captured any more: %s", refused)
        self.loop.captures = False
        self.runtime.plan_on_host("steps are not captured any more")

    def make_room(self, reason: str, num_tokens: int) -> None:
        """Let go of what other conversations have, else shrink the expert caches; CapacityError if nothing is left.

        A recording would have steps twice, so it ends as well.
        """
        if self._loaded.crossings is not None:
            self._loaded.crossings.forget()
        self._rows = None
        has_spared = self.spare_memory()
        has_shrunk = not has_spared and self.runtime.make_room(torch.OutOfMemoryError(reason))
        model = self._loaded.model
        devices = {parameter.device for parameter in model.parameters()}
        give_back_unused(devices | {accelerator.device for accelerator in self.runtime.accelerators})
        if self.runtime.recorder is not None or not (has_shrunk or has_spared):
            raise CapacityError(
                f"out of accelerator memory with {num_tokens} tokens ({reason}); shorten the conversation, or start "
                f"with a smaller --cache_size, --cache_lens (context_tokens) or --chunk_size, or in the rule file a "
                f"larger reserve_bytes"
            )


def short_reason(error: BaseException) -> str:
    """Why memory ran out, without what the allocator goes on to say."""
    return first_line(error).split(". GPU ")[0]
