"""The tools that make the embedded model: arithmetic, quantisation, text, and training that survives a kill."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tools.embedded_model.card import replaced
from tools.embedded_model.data import SPECIAL_TOKENS, Corpus, parse_mix, render
from tools.embedded_model.evaluate import PIECE_CHARS, pieces
from tools.embedded_model.experts import RoutedExperts
from tools.embedded_model.export import write
from tools.embedded_model.generate import KINDS, documents
from tools.embedded_model.import_gguf import read
from tools.embedded_model.model import Model, Shape
from tools.embedded_model.prepare import split, store, token_chars, train_tokenizer
from tools.embedded_model.q4_k import quantize
from tools.embedded_model.shared_state import SharedState, load_model
from tools.embedded_model.shrink import shrink
from tools.embedded_model.sources import sentence
from tools.embedded_model.train import importance, rate

SMALL = Shape(num_layers=2, num_experts=4, top_k=2, vocab_size=300)
ROOT = Path(__file__).parents[2]


def naive_experts(x, ids, weights, gate_up, down):
    """One token and one expert at a time."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            total = total + weight * (down[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 7, 33])
def test_experts_and_their_gradients_are_the_plain_ones(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = {"x": (num_tokens, 24), "weights": (num_tokens, 2), "gate_up": (5, 32, 24), "down": (5, 24, 16)}
    mine = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}
    plain = {n: t.detach().clone().requires_grad_() for n, t in mine.items()}
    ids = torch.rand(num_tokens, 5, generator=generator).topk(2).indices
    ids[ids == 3] = 4  # an expert without a token, and tokens that choose one twice
    target = torch.randn(num_tokens, 24, generator=generator)
    results = []
    for given, function in ((mine, RoutedExperts.apply), (plain, naive_experts)):
        result = function(given["x"], ids, given["weights"], given["gate_up"], given["down"])
        (result * target).sum().backward()
        results.append(result)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    for name in shapes:
        torch.testing.assert_close(mine[name].grad, plain[name].grad, rtol=1e-4, atol=1e-4)


def test_q4_k_is_as_exact_as_its_bits_allow() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    weights[3] = 0
    weights[4] = 0.25
    weights[5] = -0.25
    back = gguf.quants.dequantize(quantize(weights), gguf.GGMLQuantizationType.Q4_K)
    error = np.sqrt(((back - weights) ** 2).mean() / (weights**2).mean())
    assert 0.05 < error < 0.08, "4 bits with a scale and minimum per 32 Gaussian weights"
    assert not back[3].any() and np.allclose(back[4:6], [[0.25], [-0.25]], atol=0.01)


def test_q4_k_of_what_is_q4_k_changes_nothing() -> None:
    weights = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32)
    once = gguf.quants.dequantize(quantize(weights), gguf.GGMLQuantizationType.Q4_K)
    twice = gguf.quants.dequantize(quantize(once), gguf.GGMLQuantizationType.Q4_K)
    assert np.abs(once - twice).max() < 0.02 * np.abs(once).max()


def test_q4_k_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="multiple of 256 weights, these have 100"):
        quantize(np.zeros((2, 100), np.float32))


def test_a_file_means_what_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    corpus = corpus_in(tmp_path)
    model = Model(Shape(num_layers=1, num_experts=2, top_k=1, vocab_size=corpus.vocab_size))
    tokens = torch.arange(5, 25)[None]
    for full, limit in ((True, 1e-6), (False, 0.15)):
        path = tmp_path / f"{full}.gguf"
        write(model, tmp_path / "tokenizer.json", "a model", path, full_precision=full)
        wanted, found = model(tokens).detach(), read(path)(tokens)
        assert float((found - wanted).std() / wanted.std()) < limit


def test_generated_text_is_the_same_for_a_seed_and_well_formed() -> None:
    first, again, other = (list(documents(400, seed)) for seed in (5, 5, 6))
    assert first == again and first != other
    for document in first:
        roles = [role for role, _ in document["turns"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        for role, text in document["turns"]:
            assert text and not re.search(r"[{}|\[\]]", text), f"a template shows: {text}"
            assert ("  " not in text and " ." not in text and text.isascii()) or "é" in text, text
            if role == "assistant":
                assert text[0].isupper() or text[0].isdigit(), text
                assert text.rstrip()[-1] in ".!?", text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_has_many_ways_of_saying_things(kind) -> None:
    rng = random.Random(0)
    assert len({json.dumps(kind(rng)) for _ in range(200)}) > 60


def test_a_story_keeps_to_its_hero() -> None:
    from tools.embedded_model.generate.stories import tell

    rng = random.Random(1)
    for _ in range(300):
        text, values = tell(rng)
        assert values["name"] in text and values["hero"] in text
        wrong = "She" if values["he"] == "he" else "He"
        assert not re.search(rf"\b{wrong}\b", text), text


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("i'm fine", "I'm fine."),
        ("hello  there!", "Hello there!"),
        ("yes. i like it", "Yes. I like it."),
        ("it’s ok", "It's ok."),
    ],
)
def test_chat_lines_become_sentences(said: str, written: str) -> None:
    assert sentence(said) == written


def test_held_out_text_is_never_trained_on() -> None:
    texts = [f"text {number}" for number in range(3000)]
    train, held = split([*texts, *texts])
    assert not set(train) & set(held) and sorted(train + held) == sorted(texts)
    assert 20 < len(held) < 120
    assert split(reversed(texts)) == (train, held)


def test_what_a_user_says_counts_less() -> None:
    _, user, assistant, end, *_ = range(len(SPECIAL_TOKENS))
    weights = importance(torch.tensor([[user, 50, end, assistant, 60, end, 0, 70, user, 80]]))
    assert weights.tolist()[0] == pytest.approx([0.3, 0.3, 0.3, 1, 1, 1, 1, 1, 0.3, 0.3])


def test_the_rate_falls_with_the_budget_not_with_steps() -> None:
    assert rate(0, 0, 100, 0.4) < 0.02
    assert rate(5000, 50, 100, 0.4) == 1
    assert rate(5000, 80, 100, 0.4) == pytest.approx(0.5)
    assert rate(5000, 100, 100, 0.4) == 0


def test_pieces_cut_no_mark_of_a_turn() -> None:
    text = "<|user|>" + "a" * (PIECE_CHARS - 12) + "<|end|>"
    assert pieces([text, "b"], 10_000) == ["<|user|>" + "a" * (PIECE_CHARS - 12), "b"]
    assert pieces(["abc", "def"], 3) == ["abc"]


def test_card_parts_are_replaced() -> None:
    card = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert replaced(card, "x", "new") == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb"
    assert replaced(replaced(card, "x", "one"), "x", "new") == replaced(card, "x", "new")
    with pytest.raises(SystemExit, match="has no part"):
        replaced(card, "y", "new")


def test_a_smaller_model_keeps_what_it_takes_over() -> None:
    torch.manual_seed(0)
    large = Model(SMALL)
    tokens = torch.arange(40)[None]
    small = shrink(large, [1], 2, tokens)
    assert small.shape.num_layers == 1 and small.shape.num_experts == 2
    chosen = large.blocks[1].moe.load.topk(2).indices
    assert torch.equal(small.blocks[0].moe.down, large.blocks[1].moe.down[chosen])
    assert torch.equal(small.embedding.weight, large.embedding.weight)


def test_two_workers_step_as_torchs_adamw() -> None:
    torch.manual_seed(0)
    model, twin = Model(SMALL), Model(SMALL)
    twin.load_state_dict(model.state_dict())
    start = torch.cat([p.detach().flatten().clone() for p in twin.parameters()])
    state = SharedState(model, 2)
    workers = [Model(SMALL), Model(SMALL)]
    for number, worker in enumerate(workers):
        state.adopt(worker, number)
    decaying = [p for n, p in twin.named_parameters() if p.dim() >= 2 and "embedding" not in n]
    others = [p for n, p in twin.named_parameters() if p.dim() < 2 or "embedding" in n]
    adam = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.98), eps=1e-9,
    )  # fmt: skip
    for step in range(3):
        tokens = torch.randint(5, 300, (2, 17), generator=torch.Generator().manual_seed(step))
        for worker, row in zip([*workers, None], [tokens[:1], tokens[1:], tokens], strict=True):
            logits = (worker or twin)(row[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()).backward()
        for number in range(2):
            state.gather(number)
        for number in range(2):
            state.update(number, 1e-3)
        state.advance(1, 1)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    theirs = dict(twin.named_parameters())
    pairs = [(mine.detach().flatten(), theirs[name].detach().flatten()) for name, mine in workers[0].named_parameters()]
    mine, plain = (torch.cat(side) for side in zip(*pairs, strict=True))
    difference = (mine - plain).abs()
    # Adam divides by the gradient's size, so a few gradients of nearly zero make their rounding visible.
    assert float(difference.mean()) < 2e-6 and float((difference > 1e-5).float().mean()) < 0.01
    assert float((plain - start).abs().mean()) > 1e-3, "nothing moved, so nothing was compared"


def corpus_in(folder: Path) -> Corpus:
    """A corpus of our own text only, as prepare.py writes it."""
    texts = [render(document) for document in documents(300, 3)]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save(str(folder / "tokenizer.json"))
    store(folder / "generated.train.bin", tokenizer, texts)
    store(folder / "generated.held.bin", tokenizer, texts[:40])
    facts = {
        "vocab_size": tokenizer.get_vocab_size(),
        "parts": {"generated": {}},
        "token_chars": token_chars(tokenizer),
    }
    (folder / "corpus.json").write_text(json.dumps(facts))
    return Corpus(folder)


def test_a_row_begins_with_a_document(tmp_path: Path) -> None:
    corpus = corpus_in(tmp_path)
    batch = corpus.batch(parse_mix("generated=1,absent=3"), 8, 32, seed=(0, 1))
    assert batch.shape == (8, 33) and (batch[:, 0] == SPECIAL_TOKENS.index("<|user|>")).all()
    assert torch.equal(batch, corpus.batch(parse_mix("generated=1"), 8, 32, seed=(0, 1)))
    assert not torch.equal(batch, corpus.batch(parse_mix("generated=1"), 8, 32, seed=(0, 2)))


@pytest.mark.slow
def test_training_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed without warning: no worker stays behind, the checkpoint is whole, and a second run continues from it."""
    corpus_in(tmp_path)
    shape = '{"num_layers": 1, "num_experts": 2, "top_k": 1}'
    command = [sys.executable, "-m", "tools.embedded_model.train", "--data", tmp_path, "--out", tmp_path / "out",
               "--shape", shape, "--rows", "4", "--length", "32", "--mix", "generated=1"]  # fmt: skip
    checkpoint = tmp_path / "out/last.pt"
    first = subprocess.Popen([*map(str, command), "--minutes", "60", "--save_minutes", "0.01"], cwd=ROOT)
    deadline = time.monotonic() + 240
    while not checkpoint.exists():
        assert time.monotonic() < deadline and first.poll() is None, "no checkpoint was written"
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(5)
    killed = torch.load(checkpoint)
    steps, _, spent = killed["counters"].tolist()
    time.sleep(2)
    assert torch.load(checkpoint)["counters"][0] == steps, "a worker went on after its parent was killed"
    minutes = str(spent / 60 + 0.05)
    done = subprocess.run(
        [*map(str, command), "--minutes", minutes], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"resumed at step {int(steps)}" in done.stdout
    assert torch.load(checkpoint)["counters"][0] > steps
    assert load_model(checkpoint).shape.num_layers == 1
