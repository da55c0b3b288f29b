"""Answers of a GGUF file to the fixed prompts, greedy and sampled, through this package's own host.

python -m tools.embedded_model.samples hybrimoe_kt/models/small-talk-q4_k.gguf
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.engine.sampling import Sampling

from .prompts import CONVERSATION, PROMPTS, STRANGE

SAMPLED = Sampling(max_new_tokens=160, temperature=0.7, top_p=0.9, seed=1)
GREEDY = Sampling(max_new_tokens=160, temperature=0.0)


def answer(engine: Engine, messages: list[dict[str, str]], sampling: Sampling = GREEDY) -> str:
    """One answer, all of it."""
    engine.reset()
    return "".join(engine.stream(messages, sampling=sampling, as_written=True)).strip()


def conversation(engine: Engine) -> Iterator[tuple[str, str]]:
    """The fixed conversation, greedy: what is said and what is answered."""
    messages: list[dict[str, str]] = []
    for text in CONVERSATION:
        messages.append({"role": "user", "content": text})
        reply = answer(engine, messages)
        messages.append({"role": "assistant", "content": reply})
        yield text, reply


def markdown(engine: Engine) -> str:
    """Everything as the model card shows it, unedited."""
    lines = [
        f"Sampled with temperature {SAMPLED.temperature}, top-p {SAMPLED.top_p}, seed {SAMPLED.seed}.",
        "",
    ]
    for text in PROMPTS:
        lines += _item(text, greedy=answer(engine, _ask(text)), sampled=answer(engine, _ask(text), SAMPLED))
    lines += ["", "A conversation, greedy:", ""]
    lines += [line for text, reply in conversation(engine) for line in _item(text, greedy=reply)]
    lines += ["", "What it should decline, greedy:", ""]
    lines += [line for text in STRANGE for line in _item(text, greedy=answer(engine, _ask(text)))]
    return "\n".join(lines)


def _ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _item(text: str, **answers: str) -> list[str]:
    flat = {name: value.replace("\n", " / ") for name, value in answers.items()}
    if len(flat) == 1:
        return [f"- **{text}** {next(iter(flat.values()))}"]
    return [f"- **{text}**", *(f"  - {name}: {value}" for name, value in flat.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    print(markdown(build_engine(parser.parse_args().model, progress=False)))


if __name__ == "__main__":
    main()
