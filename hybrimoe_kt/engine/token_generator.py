"""Token ids in, token ids out: prompt chunks, sampling, the reused prefix, and the numbers of a run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hybrimoe_kt.device.step_graph import CaptureError, StepLost
from hybrimoe_kt.device.unused_memory import give_back_unused, is_out_of_memory
from hybrimoe_kt.errors import CapacityError, KernelError, ModelError, first_line
from hybrimoe_kt.host.hf.loading import LoadedModel
from hybrimoe_kt.host.last_runs import RunNote
from hybrimoe_kt.runtime import Runtime

from .captured_loop import CapturedLoop, captured_loop
from .growing_cache import GrowingCache, growing_cache, layer_bytes
from .layer_loop import LayerLoop
from .profiler import TimeShares
from .prompt_scores import PromptScores
from .sampler import Sampled, Sampler
from .sampling import Sampling
from .token_matcher import TokenMatcher
from .vocabulary import num_token_ids

__all__ = ["Run", "TokenGenerator"]

logger = logging.getLogger(__name__)

_LONG_CONTEXT_TOKENS = 4096
"""From which on attention's reading of the cache takes longer than what its threads cost others: some 16 MB a layer of
Qwen3-30B-A3B. Estimated; at 512 tokens a second thread of torch's cost 40 % of the tokens a second on two cores."""
_MOST_LOST = 4
"""Captured steps in a row that may be lost; by then the accelerator has been given up."""


@dataclass(slots=True)
class Run:
    """What one answer took; times in seconds, counts of this run alone."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    hits: int = 0
    misses: int = 0
    experts_on_cpu: int = 0
    experts_on_gpu: int = 0
    transfers: int = 0
    transferred_bytes: int = 0
    prefetches: int = 0
    finish: str = "stop"

    def as_dict(self) -> dict[str, Any]:
        """All fields and the rates derived from them."""
        computed = self.prompt_tokens - self.reused_tokens
        later = max(0, self.new_tokens - 1)  # the first token comes out of the prefill
        return asdict(self) | {
            "prefill_tokens_per_s": computed / self.prefill_s if self.prefill_s else 0.0,
            "decode_tokens_per_s": later / self.decode_s if self.decode_s else 0.0,
            "hit_rate": self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0,
        }


class TokenGenerator:
    """One sequence at a time over a loaded model. Keeps the KV cache of the last one to reuse its prefix."""

    def __init__(
        self,
        loaded: LoadedModel,
        end_ids: set[int],
        *,
        context_tokens: int | None = None,
        shares: TimeShares | None = None,
        captures: bool | None = None,
    ) -> None:
        """`end_ids` end an answer; `context_tokens` limits prompt and answer together, by default as the model does.

        `captures` as of `captured_loop`.
        """
        self.loaded, self.end_ids, self.shares = loaded, end_ids, shares
        self.model = loaded.model
        limit = int(self.model.config.max_position_embeddings)
        self.context_tokens = min(context_tokens or limit, limit)
        self.model_name = str(loaded.loader.file.metadata.get("general.name") or loaded.loader.file.path.stem)
        self._cache = self.new_cache()
        self.loop: LayerLoop | CapturedLoop | None
        """What steps of few tokens are computed by; None: by Transformers' own modules, as all others."""
        if loaded.dense is not None:
            self.loop = LayerLoop(loaded.dense)
        else:
            self.loop = captured_loop(loaded, self._cache, captures=captures)
        self._cache_name = loaded.cache_name
        self._cached_ids: list[int] = []
        self._run = Run()
        self._note = RunNote(self.model_name)

    @property
    def runtime(self) -> Runtime:
        """What computes the model's experts."""
        return self.loaded.runtime

    def tokens(
        self, prompt: list[int], sampling: Sampling, stop: threading.Event | None = None
    ) -> Generator[int, None, None]:
        """Yield the new token ids after `prompt`, end tokens left out; `last_run` tells what it took."""
        with closing(self.generate(prompt, sampling, stop)) as generated:
            for sampled in generated:
                if sampled.place == "answer":
                    yield sampled.token

    def generate(
        self, prompt: list[int], sampling: Sampling, stop: threading.Event | None = None
    ) -> Generator[Sampled, None, None]:
        """Do as `tokens` does, and tell how likely they were.

        With `num_prompt_logprobs` the prompt's tokens come first, and the end token last where one was drawn.
        """
        self.check_length(prompt)
        self._run = run = Run(prompt_tokens=len(prompt))
        before = self.runtime_counters()
        try:
            yield from self._generate(prompt, sampling, stop, run)
        finally:
            for name, value in self.runtime_counters().items():
                setattr(run, name, value - before[name])
            self._note.at_end(self.runtime.health())

    def _generate(
        self, prompt: list[int], sampling: Sampling, stop: threading.Event | None, run: Run
    ) -> Iterator[Sampled]:
        sample = Sampler(sampling, prompt, self.end_ids if sampling.ignore_end else (), self.matcher(sampling))
        scores = None
        if sampling.num_prompt_logprobs is not None:
            scores = PromptScores(prompt, sampling.num_prompt_logprobs)
            self.reset()
        run.reused_tokens = self._reuse(prompt)
        began = time.perf_counter()
        logits = self._forward(prompt[run.reused_tokens :], stop, scores)
        run.prefill_s = time.perf_counter() - began
        if scores is not None and logits is not None:
            yield from scores.sampled()
        limit = min(sampling.max_new_tokens, self.context_tokens - len(prompt))
        began = time.perf_counter()
        while logits is not None and limit:
            sampled = sample(logits)
            if sampled.token in self.end_ids:
                if scores is not None:
                    yield replace(sampled, place="end")
                return
            run.new_tokens += 1
            run.decode_s = time.perf_counter() - began
            yield sampled
            if sample.is_over:
                return
            if run.new_tokens >= limit:
                break
            if stop is not None and stop.is_set():
                run.finish = "cancelled"
                return
            logits = self._forward([sampled.token], stop)
        run.finish = "cancelled" if logits is None else "length"

    def matcher(self, sampling: Sampling) -> TokenMatcher | None:
        """What holds an answer to `sampling.constraint`; an `Engine` has it, who knows the tokens' texts."""
        return None

    def feed(self, text: list[int], size: int, stop: threading.Event | None = None) -> Iterator[int]:
        """Run given tokens through the model from an empty cache, `size` at a time, and draw nothing.

        Yields the number of tokens of each step before it is computed; `last_run` counts all of them as prompt.
        """
        self.check_length(text)
        self.reset()
        self._run = run = Run(prompt_tokens=len(text))
        before = self.runtime_counters()
        began = time.perf_counter()
        try:
            for at in range(0, len(text), size):
                if stop is not None and stop.is_set():
                    run.prompt_tokens, run.finish = at, "cancelled"
                    return
                piece = text[at : at + size]
                yield len(piece)
                self._forward(piece, None)
        finally:
            run.prefill_s = time.perf_counter() - began
            for name, value in self.runtime_counters().items():
                setattr(run, name, value - before[name])
            self._note.at_end(self.runtime.health())

    def append(self, ids: list[int]) -> torch.Tensor:
        """Append tokens to what is cached, drawing nothing; return the last one's logits `[vocab]`, float32 on the CPU.

        Valid until the next step.
        """
        logits = self._forward(ids, None)
        assert logits is not None, "nobody stops it"
        return logits

    @torch.inference_mode()
    def _forward(
        self, ids: list[int], stop: threading.Event | None, scores: PromptScores | None = None
    ) -> torch.Tensor | None:
        """Append `ids` to the cache, in chunks; return the last token's logits `[vocab]`, float32 on the CPU.

        None when `stop` is set between two chunks. Where an accelerator's memory runs out, expert caches shrink and
        everything that was cached is computed again: some layers have the failed chunk, others have not. So it is
        where a captured step is lost.
        """
        began = time.perf_counter()
        whole, left, num_lost = self._cached_ids + ids, ids, 0
        while True:
            try:
                logits = self._append(left, stop, scores)
                break
            except CaptureError as refused:
                self._capture_no_more(refused)
                left = whole
                continue
            except StepLost as lost:
                num_lost += 1
                if num_lost > _MOST_LOST:
                    raise KernelError(str(lost)) from lost
                self.start_anew()
                left = whole
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error).split(". GPU ")[0]  # which goes on about the allocator
            self._make_room(reason, len(whole))  # not above: the error's frames hold what the failed step allocated
            left = whole
            if scores is not None:
                scores.clear()
        self._note.at_step(self.runtime.health())
        if logits is None:
            return None
        if not logits.sum().isfinite():
            self.start_anew()
            raise KernelError("the model produced NaN or infinite logits; the weights or a backend are broken")
        if self.shares is not None:
            self.shares.step(len(ids), time.perf_counter() - began)
        return logits

    def _append(self, ids: list[int], stop: threading.Event | None, scores: PromptScores | None) -> torch.Tensor | None:
        step = self.runtime.options.max_chunk_tokens
        if scores is not None:
            step = min(step, scores.max_tokens(num_token_ids(self.model)))
        logits: torch.Tensor | None = None
        for at in range(0, len(ids), step):
            if stop is not None and stop.is_set() and at:
                return None
            piece = ids[at : at + step]
            # A failed chunk leaves an unknown number of layers updated: forget the cache unless this completes.
            cached, self._cached_ids = self._cached_ids, []
            length = len(cached) + len(piece)
            by_loop = self.loop is not None and scores is None and self.loop.takes(len(piece), length)
            self._share_cores(len(piece), len(cached), by_graphs=by_loop and isinstance(self.loop, LayerLoop))
            if self.loop is not None and by_loop:
                logits = self.loop.step(piece, self._cache)
            else:
                logits = self._by_modules(piece, scores)
            cached += piece
            self._cached_ids = cached
        return logits

    def _by_modules(self, piece: list[int], scores: PromptScores | None) -> torch.Tensor:
        """Append `piece` to the cache by Transformers' own loop over layers; the last token's logits."""
        reads_on_host = getattr(self.model.get_input_embeddings(), "reads_on_host", False)
        reads_on_host &= not self.loaded.architecture.layers_take_ids
        tokens = torch.tensor([piece], device="cpu" if reads_on_host else self.model.device)
        given = {self._cache_name: self._cache}
        kept = 1 if scores is None else 0  # 0 keeps those of every token
        output = self.model(input_ids=tokens, use_cache=True, logits_to_keep=kept, **given)
        if scores is not None:
            scores.add(output.logits[0])
        logits: torch.Tensor = output.logits[0, -1].float().cpu()
        return logits

    def _share_cores(self, num_tokens: int, num_cached: int, *, by_graphs: bool) -> None:
        """Give torch one thread for single tokens: its second would spin on after each of many small operations.

        On a core that the experts' threads want meanwhile. Long contexts are worth it again, but not beside graphs.
        """
        is_small = num_tokens == 1 and num_cached < _LONG_CONTEXT_TOKENS
        wanted = 1 if is_small or by_graphs else self.runtime.num_dense_threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def _capture_no_more(self, refused: CaptureError) -> None:
        """Forget the conversation, of which a step was left half done, and ask the modules for every step to come."""
        assert isinstance(self.loop, CapturedLoop), "nobody else captures"
        logger.warning("steps are not captured any more: %s", refused)
        self.loop.captures = False
        self.start_anew()

    def _make_room(self, reason: str, num_tokens: int) -> None:
        """Forget the conversation and shrink the expert caches; CapacityError if there is nothing left to shrink.

        A recording would have steps twice, so it ends as well.
        """
        self.start_anew()
        if self.loaded.crossings is not None:
            self.loaded.crossings.forget()
        has_shrunk = self.runtime.make_room(torch.OutOfMemoryError(reason))
        devices = {parameter.device for parameter in self.model.parameters()}
        give_back_unused(devices | {accelerator.device for accelerator in self.runtime.accelerators})
        if self.runtime.recorder is not None or not has_shrunk:
            raise CapacityError(
                f"out of accelerator memory with {num_tokens} tokens ({reason}); shorten the conversation, or start "
                f"with a smaller --cache_size, --cache_lens (context_tokens) or --chunk_size, or in the rule file a "
                f"larger reserve_bytes"
            )

    def _reuse(self, prompt: list[int]) -> int:
        """Keep the cached prefix that `prompt` shares, at most all but its last token; return its length."""
        common = 0
        for cached, wanted in zip(self._cached_ids, prompt[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        surplus = self._cache.get_seq_length() - common
        # linear attention keeps one state, not one a token: it goes on from the end or starts anew
        if common == 0 or surplus < 0 or (surplus > 0 and not self._cache.is_croppable):
            self.reset()
            return 0
        if surplus > 0:
            self._cache.crop(-surplus)  # this version of Transformers counts from the end only
        self._cached_ids = self._cached_ids[:common]
        return common

    def check_length(self, prompt: list[int]) -> None:
        """Raise CapacityError for a prompt the context cannot hold, ModelError for tokens the model does not have."""
        if not prompt:
            raise CapacityError("the prompt is empty; give at least one character")
        if len(prompt) >= self.context_tokens:
            raise CapacityError(
                f"the conversation has {len(prompt)} tokens, the context holds {self.context_tokens} with the answer; "
                f"shorten it, or start a new one"
            )
        known = num_token_ids(self.model)
        if max(prompt) >= known:
            raise ModelError(
                f"token {max(prompt)} of the prompt is not one of the model's {known}; "
                f"the tokenizer belongs to another model"
            )

    @property
    def cache_bytes(self) -> int:
        """Memory that the cached conversation's keys and values take."""
        return sum(layer_bytes(layer) for layer in self._cache.layers)

    def reset(self) -> None:
        """Forget the cached conversation; captured steps go on in its memory, unless a step has failed in it.

        Layers may then differ in room, and hold numbers that are not finite.
        """
        has_failed = not self._cached_ids and self._cache.get_seq_length() > 0
        if isinstance(self.loop, CapturedLoop) and not has_failed:
            self._cache.forget()
            self._cached_ids = []
        else:
            self.start_anew()

    def start_anew(self) -> None:
        """Forget the cached conversation, and let go of its memory."""
        if isinstance(self.loop, CapturedLoop):
            self.loop.forget()
        self._cache, self._cached_ids = self.new_cache(), []

    def new_cache(self) -> GrowingCache:
        own, kept = self.loaded.cache_layers(), self.loaded.kv_cache_type
        planned = min([self.context_tokens, *(plan.context_tokens for plan in self.loaded.plans.values())])
        return growing_cache(self.model.config, own, kv_cache_type=kept, most_tokens=planned)

    def runtime_counters(self) -> dict[str, int]:
        """The counters of a `Run` as they stand since the model was loaded."""
        stats = self.runtime.statistics()
        names = {"transfers": "num_transfers", "prefetches": "num_prefetches"}
        wanted = ("hits", "misses", "experts_on_cpu", "experts_on_gpu", "transfers", "transferred_bytes", "prefetches")
        return {name: int(stats.get(names.get(name, name), 0)) for name in wanted}

    def last_run(self) -> dict[str, Any]:
        """The last answer's counts, times and rates; `health` is of everything since the model was loaded."""
        return self._run.as_dict() | {"health": self.runtime.health().as_dict()}
