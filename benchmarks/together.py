"""What a step of several conversations takes, against a step of each of them alone, on a CPU.

    python -m benchmarks.together                     # the model that comes along
    python -m benchmarks.together MODEL.gguf
    python -m benchmarks.together --deepseek FILE     # writes a random DeepSeek-V2-like model there first, 290 MB
    python -m benchmarks.together --one-thread        # and the time of the processor, where others want it as well

2, 4 and 8 conversations of 100 to 400 tokens. Both ways take turns, and the best turn of each counts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hybrimoe_kt import models
from hybrimoe_kt.backends.ggml.pool import pool
from hybrimoe_kt.engine.memory.growing_cache import GrowingCache
from hybrimoe_kt.engine.steps.layer_loop import LayerLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model

LENGTHS = (100, 400, 150, 350, 200, 300, 250, 120)
NUMBERS, PIECE, STEPS_A_TURN = (2, 4, 8), 32, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a GGUF file; by default the one that comes along")
    parser.add_argument("--deepseek", type=Path, metavar="FILE", help="write such a model here, and measure it")
    parser.add_argument("--one-thread", action="store_true", help="seconds of one thread, whatever else runs")
    parser.add_argument("--turns", type=int, default=20, help="default: %(default)s")
    given = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, object] = {"accelerator": "none"}
    if given.one_thread:
        options["cpu_threads"] = pool(1).num_threads  # which dense layers then take as well
    file = _deepseek(given.deepseek) if given.deepseek else given.model or models.embedded_model()
    engine = TokenGenerator(load_model(file, option_overrides=options, progress=False), set())
    clock = time.thread_time if given.one_thread else time.perf_counter
    print("| conversations | one after the other | together | ratio |\n|---|---|---|---|")
    for number in NUMBERS:
        alone, together = measured(engine, LENGTHS[:number], given.turns, clock)
        print(f"| {number} | {1e3 * alone:.2f} ms | {1e3 * together:.2f} ms | {alone / together:.2f} |")


def measured(
    engine: TokenGenerator, lengths: Sequence[int], turns: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds in which each conversation has a token more: one after the other, and together."""
    loop, vocab = engine.loop, int(engine.model.config.vocab_size)
    assert isinstance(loop, LayerLoop), "a model whose layers are graphs"
    alone, together = ([_conversation(engine, loop, length, vocab) for length in lengths] for _ in range(2))

    def one_by_one(ids: list[int]) -> None:
        for token, cache in zip(ids, alone, strict=True):
            loop.step([token], cache)

    ways: tuple[Callable[[list[int]], object], ...] = (one_by_one, lambda ids: loop.step_together(ids, together))
    best = [float("inf"), float("inf")]
    for _ in range(turns):
        for way, step in enumerate(ways):
            began = clock()
            for _ in range(STEPS_A_TURN):
                step([random.randrange(vocab) for _ in lengths])
            best[way] = min(best[way], (clock() - began) / STEPS_A_TURN)
    return best[0], best[1]


def _conversation(engine: TokenGenerator, loop: LayerLoop, length: int, vocab: int) -> GrowingCache:
    cache = engine.new_cache()
    for at in range(0, length, PIECE):
        loop.step([random.randrange(vocab) for _ in range(min(PIECE, length - at))], cache)
    return cache


def _deepseek(file: Path) -> Path:
    from tests.support.generated_model import DEEPSEEK_V2_LITE_LAYER, Type, generate

    shape = replace(
        DEEPSEEK_V2_LITE_LAYER, layers=8, hidden=1024, heads=8, kv_heads=8, experts=32, inter=512, dense_inter=2048,
        q_lora_rank=0, kv_lora_rank=256, types=(Type.Q4_K, Type.Q4_K, Type.Q6_K),
    )  # fmt: skip
    generate(shape, file, keep_state=False)
    return file


if __name__ == "__main__":
    main()
