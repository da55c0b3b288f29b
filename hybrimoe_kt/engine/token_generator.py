"""Token ids in, token ids out: several answers side by side, what is kept of them, and the numbers of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import torch

from hybrimoe_kt.errors import CapacityError, ConfigError, ModelError
from hybrimoe_kt.host.hf.loading import LoadedModel
from hybrimoe_kt.host.last_runs import RunNote
from hybrimoe_kt.runtime import Runtime

from .batch import Batch
from .chat.turns import NO_TURNS, Turns
from .forms.token_matcher import TokenMatcher
from .generation import Generation, Run
from .memory.conversation import Conversation
from .memory.growing_cache import GrowingCache, growing_cache, layer_bytes
from .memory.kept_files import KeptFiles, identity
from .memory.layer_states import states_of
from .memory.prefix_cache import PrefixCache
from .sampler import Sampled, Sampler
from .sampling import Sampling
from .steps.captured_loop import CapturedLoop, captured_loop
from .steps.layer_loop import LayerLoop
from .steps.model_steps import ModelSteps
from .steps.profiler import TimeShares
from .vocabulary import num_token_ids

__all__ = ["Generation", "Run", "TokenGenerator"]

_RAM_SHARE = 8
"""Of the machine's memory, what kept conversations may take where nobody says. A choice: weights want the rest."""
_RUNNING_SHARE = 4
"""Of the machine's memory, what those being answered may take; one of them may have all of its context in any case."""


class TokenGenerator:
    """Sequences over a loaded model, up to `parallel` at once. Keeps conversations to go on from their beginnings."""

    def __init__(
        self,
        loaded: LoadedModel,
        end_ids: set[int],
        *,
        context_tokens: int | None = None,
        shares: TimeShares | None = None,
        captures: bool | None = None,
        parallel: int = 1,
        cache_ram: int | None = 0,
    ) -> None:
        """`end_ids` end an answer; `context_tokens` limits prompt and answer together, by default as the model does.

        `cache_ram` bytes are for conversations that were answered; 0 keeps the latest alone, None takes an eighth of
        the machine's memory. `captures` as of `captured_loop`.
        """
        if parallel < 1:
            raise ConfigError(f"parallel is {parallel}, valid: 1 or more")
        self.loaded, self.end_ids, self.parallel, self.shares = loaded, end_ids, parallel, shares
        self.model = loaded.model
        limit = int(self.model.config.max_position_embeddings)
        self.context_tokens = min(context_tokens or limit, limit)
        self.model_name = str(loaded.loader.file.metadata.get("general.name") or loaded.loader.file.path.stem)
        first = self.new_cache()
        loop: LayerLoop | CapturedLoop | None
        if loaded.dense is not None:
            loop = LayerLoop(loaded.dense)
        else:
            loop = captured_loop(loaded, first, captures=captures)
        if not (isinstance(loop, CapturedLoop) and loop.captures):
            loaded.runtime.plan_on_host("single tokens are not captured here")
        self.steps = ModelSteps(loaded, self.new_cache, shares, loop)
        budget = psutil.virtual_memory().total // _RAM_SHARE if cache_ram is None else cache_ram
        moves = isinstance(loop, CapturedLoop) or self.model.device.type != "cpu"
        self.kept = PrefixCache(self.new_cache, budget, most_live=parallel, moves_to_host=moves)
        self.steps.spare_memory = self.kept.spare
        self.batch = Batch(self.steps, self.kept, most=parallel, most_tokens=self._most_tokens(), on_end=self._close)
        self._files: dict[Path, KeptFiles] = {}
        self._own: Conversation | None = None
        """What `append` and `feed` go on with."""
        self._run = Run()
        self._latest: Generation | None = None
        self._note = RunNote(self.model_name)
        self._steps_s = 0.0

    @property
    def runtime(self) -> Runtime:
        """What computes the model's experts."""
        return self.loaded.runtime

    @property
    def loop(self) -> LayerLoop | CapturedLoop | None:
        """What steps of few tokens are computed by; None: by Transformers' own modules, as all others."""
        return self.steps.loop

    @loop.setter
    def loop(self, loop: LayerLoop | CapturedLoop | None) -> None:
        self.steps.loop = loop

    def _most_tokens(self) -> int:
        """Of all answers at once: what accelerators' memory was planned for, which is one conversation's.

        On a CPU as many conversations' as may run, within a share of the machine's memory.
        """
        planned = [plan.context_tokens for plan in self.loaded.plans.values()]
        if planned:
            return max(self.context_tokens, min(planned))
        token_bytes = sum(getattr(layer, "token_bytes", 0) for layer in self.new_cache().layers)
        most = self.context_tokens * self.parallel
        if token_bytes:
            most = min(most, psutil.virtual_memory().total // _RUNNING_SHARE // token_bytes)
        return max(self.context_tokens, most)

    # Answers.

    def begin(
        self,
        prompt: list[int],
        sampling: Sampling,
        stop: threading.Event | None = None,
        turns: Turns = NO_TURNS,
    ) -> Generation:
        """Let an answer to `prompt` wait for its turn: `step` brings it on, beside others.

        It ends once `stop` is set. Where states cannot be shortened, later prompts go on from `turns`. Raises as
        `check_length` does.
        """
        self.check_length(prompt)
        self._keep_own()
        sampler = Sampler(sampling, prompt, self.end_ids if sampling.ignore_end else (), self.matcher(sampling))
        generation = Generation(
            prompt, sampling, sampler, end_ids=self.end_ids, most_tokens=self.context_tokens,
            stop=stop or threading.Event(), turns=turns,
        )  # fmt: skip
        generation.num_before = self.runtime_counters()
        self._latest = generation
        self.batch.add(generation)
        return generation

    def matcher(self, sampling: Sampling) -> TokenMatcher | None:
        """What holds an answer to `sampling.constraint`; an `Engine` has it, who knows the tokens' texts."""
        return None

    def step(self) -> None:
        """Bring all answers that were begun on by one step; errors of single answers are theirs to tell."""
        began = time.perf_counter()
        try:
            self.batch.step()
        finally:
            self._steps_s += time.perf_counter() - began
        self._note.at_step(self.runtime.health())

    def leave(self, generation: Generation, finish: str = "cancelled") -> None:
        """Nobody wants the rest of it."""
        self.batch.drop(generation, finish)

    def _close(self, generation: Generation) -> None:
        generation.close(self.runtime_counters(), {"health": self.runtime.health().as_dict()})
        self._note.at_end(self.runtime.health())

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
        generation = self.begin(prompt, sampling, stop)
        try:
            while True:
                while (sampled := generation.take()) is not None:
                    yield sampled
                if generation.is_over:
                    break
                self.step()
        finally:
            self.leave(generation)
        if generation.error is not None:
            raise generation.error

    # Given text.

    def feed(self, text: list[int], size: int, stop: threading.Event | None = None) -> Iterator[int]:
        """Run given tokens through the model from an empty cache, `size` at a time, and draw nothing.

        Yields the number of tokens of each step before it is computed; `last_run` counts all of them as prompt.
        """
        self.check_length(text)
        self.reset()
        self._latest, self._run = None, Run(prompt_tokens=len(text))
        run, before = self._run, self.runtime_counters()
        began = time.perf_counter()
        try:
            for at in range(0, len(text), size):
                if stop is not None and stop.is_set():
                    run.prompt_tokens, run.finish = at, "cancelled"
                    return
                piece = text[at : at + size]
                yield len(piece)
                self.append(piece)
        finally:
            run.prefill_s = time.perf_counter() - began
            for name, value in self.runtime_counters().items():
                setattr(run, name, value - before[name])
            self._note.at_end(self.runtime.health())

    def append(self, ids: list[int]) -> torch.Tensor:
        """Append tokens to what is held, drawing nothing; return the last one's logits `[vocab]`, float32 on the CPU.

        Valid until the next step.
        """
        if self._own is None:
            self._own = self.kept.new()
        try:
            logits = self.steps.append(self._own, ids)
        except BaseException:
            self.kept.drop(self._own)
            self._own = None
            raise
        self._note.at_step(self.runtime.health())
        return logits

    def go_on_from(self, prompt: list[int]) -> int:
        """Have `append` go on from what is kept of `prompt`, at most all but its last token; return its length."""
        self._keep_own()
        self._own = self.kept.take(prompt)
        return len(self._own.ids)

    @property
    def conversation(self) -> Conversation | None:
        """What `append` goes on with; None: what was answered last is kept."""
        return self._own

    def _keep_own(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            self.kept.put(own)

    def reset(self) -> None:
        """Forget what is kept; memory that captured steps read stays."""
        self._keep_own()
        self.kept.clear()

    def save_kept(self, folder: str | Path, on_saved: Callable[[int], object] = lambda num_bytes: None) -> int:
        """Write all that is kept to files in `folder`, for `restore_kept` of another process; return how many.

        Files there take at most what `cache_ram` allows, or what it does by default; `on_saved` hears the bytes of
        each. ConfigError where the folder cannot be written.
        """
        self._keep_own()
        most_bytes = max(self.kept.budget_bytes, self.kept.num_bytes, psutil.virtual_memory().total // _RAM_SHARE)
        return self._kept_files(folder).save(self.kept.copies(), most_bytes, on_saved)

    def restore_kept(self, folder: str | Path) -> int:
        """Go on from what `save_kept` has written with this model, as far as it fits; return how many there are."""
        files = self._kept_files(folder)
        num = self.kept.restore(files.load())
        files.keep_to(self.kept.copies())
        return num

    @property
    def can_save_kept(self) -> bool:
        """Whether conversations can be copied: not where a layer's states are known to Transformers alone."""
        return all(states_of(layer, 0) is not None for layer in self.new_cache().layers)

    def _kept_files(self, folder: str | Path) -> KeptFiles:
        found = self._files.get(Path(folder))
        if found is None:
            cache, loaded = self.new_cache(), self.loaded
            sizes = (getattr(layer, "token_bytes", "") for layer in cache.layers)
            places = (parameter.device for parameter in self.model.parameters())
            kept = loaded.kv_cache_type, self.model.dtype, *sizes, *places
            file = loaded.loader.file
            name = identity(file.files, file.metadata, self.model.config, cache, kept)
            found = self._files[Path(folder)] = KeptFiles(Path(folder), name)
        return found

    def start_anew(self) -> None:
        """Forget what is kept, with its memory and all that was captured: the runtime is to be another one."""
        self.reset()
        self.steps.forget()
        self.kept.spare()

    # What it takes.

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
        """Memory that the conversation of `append` takes, and those that are kept."""
        own = 0 if self._own is None else sum(layer_bytes(layer) for layer in self._own.cache.layers)
        return own + self.kept.num_bytes

    def new_cache(self) -> GrowingCache:
        """Make a cache for one conversation."""
        own, kept = self.loaded.cache_layers(), self.loaded.kv_cache_type
        planned = min([self.context_tokens, *(plan.context_tokens for plan in self.loaded.plans.values())])
        return growing_cache(self.model.config, own, kv_cache_type=kept, most_tokens=planned)

    def runtime_counters(self) -> dict[str, int]:
        """The counters of a `Run` as they stand since the model was loaded."""
        stats = self.runtime.statistics()
        names = {"transfers": "num_transfers", "prefetches": "num_prefetches"}
        wanted = ("hits", "misses", "experts_on_cpu", "experts_on_gpu", "transfers", "transferred_bytes", "prefetches")
        return {name: int(stats.get(names.get(name, name), 0)) for name in wanted}

    def seconds(self) -> dict[str, float]:
        """Where the host's time went, measured; nothing of the parts where `shares` counts them."""
        found = {"steps": self._steps_s}
        if self.shares is None:
            ours = self.runtime.seconds
            names = ("read", "plan", "prefetch", "submit_and_gpu", "wait", "replay")
            found |= {name: getattr(ours, name) for name in names}
        return found

    def last_run(self) -> dict[str, Any]:
        """The latest answer's counts, times and rates; `health` is of everything since the model was loaded."""
        told = self._run.as_dict() if self._latest is None else self._latest.numbers()
        return told | {"health": self.runtime.health().as_dict()}
