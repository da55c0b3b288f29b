"""What the command line gets of a model that does not write `<think>`, and what it gives back in the next turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.chat.thinking import effort_options
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.engine.sampler import Sampled
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.notations import CONTENT, ROWS, THOUGHT
from tests.support.vocabularies import byte_level

SMALL: dict[str, Any] = {"hidden": 64, "inter": 64, "dense_inter": 64, "heads": 2, "kv_heads": 1, "layers": 1}
HARMONY = (
    f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{CONTENT}<|return|>"
)
GEMMA = f"<|channel>thought\n{THOUGHT}<channel|>{CONTENT}"
QWEN = f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}"


class Written:
    """An answer that is there at once."""

    is_over, error = True, None

    def __init__(self, engine: Engine, text: str) -> None:
        ids = engine.vocabulary.text_ids(text)
        self._tokens = [Sampled(token) for token in ids if token not in engine.end_ids]

    def take(self) -> Sampled | None:
        return self._tokens.pop(0) if self._tokens else None

    def numbers(self) -> dict[str, Any]:
        return {"finish": "stop"}


@pytest.fixture
def engine_of(generated: Callable[[Shape], GeneratedModel]) -> Callable[[str, str], Engine]:
    """Builds an engine of a row's chat template that answers with a text, whatever it is asked."""

    def build(name: str, text: str) -> Engine:
        row = ROWS[name]
        made = byte_level("gpt-4o", special=("<|endoftext|>", "<|pad|>", "<|bos|>", *row.special))
        vocabulary = replace(made, chat_template=row.template)
        path = generated(Shape(vocabulary=vocabulary, context=4096, **SMALL)).path
        engine = build_engine(path, progress=False, option_overrides={"cpu_backend": "torch_reference"})

        engine.begin = lambda *_: Written(engine, text)  # type: ignore[method-assign, assignment, return-value]
        engine.leave = lambda *_: None  # type: ignore[method-assign, assignment]
        return engine

    return build


@pytest.mark.parametrize(
    ("name", "text"),
    [("gpt-oss", HARMONY), ("Gemma 4", GEMMA), ("hermes (Qwen3)", QWEN)],
    ids=["Harmony", "Gemma", "Qwen"],
)
def test_thoughts_stand_between_think_marks(engine_of: Callable[[str, str], Engine], name: str, text: str) -> None:
    engine = engine_of(name, text)
    said = "".join(engine.stream("Weather?", sampling=Sampling(), as_written=True, stop=threading.Event()))
    assert said == QWEN
    assert "".join(engine.stream("Weather?", sampling=Sampling())) == CONTENT
    answer = engine.chat("Weather?")
    assert (answer.thoughts, answer.text) == (THOUGHT, CONTENT)
    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": said}]
    prompt = engine.vocabulary.text_of_all(engine.vocabulary.chat_ids(turns))
    assert (text.removesuffix("<|return|>") if name != "gpt-oss" else CONTENT + "<|end|>") in prompt
    assert name == "hermes (Qwen3)" or "think>" not in prompt


def test_efforts_reach_the_template_by_default_and_by_request(engine_of: Callable[[str, str], Engine]) -> None:
    vocabulary = engine_of("gpt-oss", HARMONY).vocabulary
    hello = [{"role": "user", "content": "hello"}]
    assert "Reasoning: medium" in vocabulary.text_of_all(vocabulary.chat_ids(hello))
    vocabulary.default_options = effort_options(vocabulary.takes, "high") or {}
    assert "Reasoning: high" in vocabulary.text_of_all(vocabulary.chat_ids(hello))
    low = vocabulary.chat_ids(hello, template_options={"reasoning_effort": "low"})
    assert "Reasoning: low" in vocabulary.text_of_all(low)
