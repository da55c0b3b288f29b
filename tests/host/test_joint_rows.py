"""A step of several conversations as rows of one batch: every family's logits are those of each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrimoe_kt.engine.memory.conversation import Conversation
from hybrimoe_kt.engine.steps.joint_rows import JointRows, leave_rows
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.by_modules import by_modules
from tests.support.captured_steps import EXACT

from .families import FAMILIES, random_model, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

IN_TURN = {"deepseek32", "glm-dsa", "qwen4exp", "deepseek4", "minimax-m3"}
"""Families whose layers hold what does not lie in rows: an indexer's keys, compressed tokens, token ids."""
QUICK = {"gpt-oss", "gemma4", "nemotron", "llama4"}
"""Windows and sinks, two bases, state spaces, chunks."""
LENGTHS = 5, 33, 1, 18
"""Of conversations; windows and chunks of these models are 8 to 32 long."""


def texts(num_more: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, 250, (length + num_more,), generator=draw).tolist() for length in LENGTHS]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_rows_are_what_each_is_alone(name: str, tmp_path: Path) -> None:
    """Across a growth of the memory, with one that leaves and one that comes back, and alone again afterwards."""
    folder = save_checkpoint(name, random_model(name), tmp_path)
    loaded = load_model(folder, device="emulated:0", option_overrides=EXACT, progress=False)
    made = TokenGenerator(loaded, set(), parallel=len(LENGTHS))
    by_modules(made)
    given = texts(40)
    wanted = []
    for text, length in zip(given, LENGTHS, strict=True):
        alone = Conversation(made.new_cache())
        rows = [made.steps.append(alone, text[:length])]
        rows += [made.steps.append(alone, [token]) for token in text[length:]]
        wanted.append(torch.stack([row.clone() for row in rows if row is not None]))
    assert min(float(each.std()) for each in wanted) > 0.1, "logits that are all alike would prove nothing"
    held = [Conversation(made.new_cache()) for _ in LENGTHS]
    for conversation, text, length in zip(held, given, LENGTHS, strict=True):
        made.steps.append(conversation, text[:length])
    takes = JointRows.takes(loaded, [conversation.cache for conversation in held])
    assert takes == (name not in IN_TURN)
    if not takes:
        return
    orders = [[0, 1, 2, 3]] * 6 + [[3, 1, 0]] * 5 + [[1, 3]] * 3 + [[2, 0, 3, 1]] * 8
    done = [0] * len(LENGTHS)
    for order in orders:
        ids = [given[one][LENGTHS[one] + done[one]] for one in order]
        logits = made.steps.together([held[one] for one in order], ids)
        assert logits is not None
        for row, one in enumerate(order):
            done[one] += 1
            torch.testing.assert_close(
                logits[row], wanted[one][done[one]], rtol=0, atol=1e-3, msg=f"{one} at {done[one]}"
            )
    leave_rows(held[1].cache)
    for one in (1, 2):
        for _ in range(3):
            found = made.steps.append(held[one], [given[one][LENGTHS[one] + done[one]]])
            done[one] += 1
            torch.testing.assert_close(found, wanted[one][done[one]], rtol=0, atol=1e-3)
