"""A model whose answers are written down: every byte a token, so that characters and stop strings span tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybrimoe_kt.engine.chat.turns import NO_TURNS, Turns
from hybrimoe_kt.engine.facts import Counters, ModelInfo
from hybrimoe_kt.engine.sampler import Sampled
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.vocabulary import Vocabulary
from hybrimoe_kt.errors import CapacityError, ModelError
from hybrimoe_kt.runtime.health import Health

# Qwen's conversation, with as much of its tools as a test needs.
QWEN = (
    "{% if tools %}<|im_start|>system\ntools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")


def byte_tokenizer(chat_template: str | None = QWEN, special: Sequence[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """Token id n is byte n in the order of the byte-level alphabet; `special` tokens follow, by default Qwen's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def echo(prompt: str) -> str:
    """Say what the last message was."""
    last = prompt.split("<|im_end|>")[-2:][0].lstrip("\n")
    return "echo: " + last.split("\n", 1)[-1]


class Scripted:
    """One answer of a `ScriptedEngine`, brought on by its steps."""

    def __init__(self, tokens: Generator[Sampled, None, None], run: dict[str, Any]) -> None:
        self.tokens, self.run = tokens, run
        self.drawn: list[Sampled] = []
        self.is_over = False
        self.error: Exception | None = None

    def step(self) -> None:
        try:
            self.drawn.append(next(self.tokens))
        except StopIteration:
            self.is_over = True
        except Exception as error:
            self.is_over, self.error = True, error

    def take(self) -> Sampled | None:
        return self.drawn.pop(0) if self.drawn else None

    def numbers(self) -> dict[str, Any]:
        return self.run


class ScriptedEngine:
    """Answers `script(prompt text)`; `before_token` is called before each token and may wait or raise."""

    model_name = "scripted"
    parallel = 1

    def __init__(
        self,
        script: Callable[[str], str] = echo,
        *,
        before_token: Callable[[int, threading.Event], None] = lambda number, stop: None,
        chat_template: str | None = QWEN,
        context_tokens: int = 4096,
        model_type: str = "qwen3_moe",
        special: Sequence[str] = SPECIAL,
    ) -> None:
        self.script, self.before_token, self.context_tokens = script, before_token, context_tokens
        self.tokenizer = byte_tokenizer(chat_template, special)
        model: Any = SimpleNamespace(
            config=SimpleNamespace(model_type=model_type),
            get_input_embeddings=lambda: SimpleNamespace(num_embeddings=len(self.tokenizer)),
        )
        self.vocabulary = Vocabulary(self.tokenizer, model)
        self._info = ModelInfo(architecture=model_type, hidden_size=8, num_layers=1, expert_bytes=0)
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []
        self._begun: list[Scripted] = []

    def _new_run(self, prompt: list[int]) -> dict[str, Any]:
        counts = dict.fromkeys(("reused_tokens", "new_tokens", "prefill_s", "decode_s", "decode_tokens_per_s"), 0)
        return counts | {"prompt_tokens": len(prompt), "finish": "stop"}

    def info(self) -> ModelInfo:
        return self._info

    def counters(self) -> Counters:
        return Counters(
            accelerators=(), health=Health(), statistics={}, hits=(), misses=(), last_hits=(), last_misses=()
        )

    def check_length(self, prompt: list[int]) -> None:
        if not 0 < len(prompt) < self.context_tokens:
            raise CapacityError(f"{len(prompt)} tokens, the context holds {self.context_tokens}")
        if max(prompt) >= len(self.tokenizer):
            raise ModelError(f"token {max(prompt)} is not one of the model's")

    def begin(self, prompt: list[int], sampling: Sampling, stop: threading.Event, turns: Turns = NO_TURNS) -> Scripted:
        run = self._new_run(prompt)
        self._begun.append(Scripted(self.generate(prompt, sampling, stop, run), run))
        return self._begun[-1]

    def step(self) -> None:
        for begun in list(self._begun):
            begun.step()
        self._begun = [begun for begun in self._begun if not begun.is_over]

    def leave(self, begun: Scripted, finish: str = "cancelled") -> None:
        if begun in self._begun:
            self._begun.remove(begun)

    def generate(
        self, prompt: list[int], sampling: Sampling, stop: threading.Event, run: dict[str, Any]
    ) -> Generator[Sampled, None, None]:
        self.prompts.append(self.tokenizer.decode(prompt))
        self.samplings.append(sampling)
        if sampling.num_prompt_logprobs is not None:
            for number, token in enumerate(prompt):
                yield self._sampled(token, sampling.num_prompt_logprobs, "prompt", is_known=number > 0)
        for number, token in enumerate(self.vocabulary.text_ids(self.script(self.prompts[-1]))):
            self.before_token(number, stop)
            if stop.is_set():
                run["finish"] = "cancelled"
                return
            if number >= min(sampling.max_new_tokens, self.context_tokens - len(prompt)):
                run["finish"] = "length"
                return
            run["new_tokens"] += 1
            yield self._sampled(token, sampling.num_logprobs, "answer")
        if sampling.num_prompt_logprobs is not None:
            yield self._sampled(self.tokenizer.eos_token_id, sampling.num_logprobs, "end")

    def _sampled(self, token: int, num_likeliest: int | None, place: Any, *, is_known: bool = True) -> Sampled:
        likeliest = ((token, -0.5),) * (num_likeliest or 0)
        return Sampled(token, -0.5, likeliest, place) if is_known else Sampled(token, place=place)
