"""Every sampling option against its definition, and the text that tokens make."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybrimoe_kt.engine.sampler import Sampler
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.text.detokenizer import IncrementalDetokenizer

VOCABULARY = 41
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def drawn(count: int = 300, prompt: tuple[int, ...] = (), **options: object) -> list[int]:
    """Tokens drawn one after the other from the same logits."""
    draw = Sampler(Sampling(**{"temperature": 1.0, "top_p": 1.0, "seed": 5} | options), prompt)  # type: ignore[arg-type]
    return [draw(LOGITS).token for _ in range(count)]


def ranked() -> list[int]:
    return LOGITS.argsort(descending=True).tolist()


def test_top_k_and_min_p_leave_out_the_unlikely() -> None:
    assert set(drawn(top_k=3)) == set(ranked()[:3])
    assert set(drawn(top_k=VOCABULARY + 5, temperature=50.0)) == set(drawn(temperature=50.0))
    share = LOGITS.softmax(-1) / LOGITS.softmax(-1).max()
    likely = {token for token in range(VOCABULARY) if share[token] >= 0.3}
    assert 1 < len(likely) < VOCABULARY
    assert set(drawn(min_p=0.3)) == likely


def test_the_draws_follow_the_distribution_and_the_seed() -> None:
    counts = Counter(drawn(4000))
    for token in ranked()[:4]:
        assert counts[token] / 4000 == pytest.approx(float(LOGITS.softmax(-1)[token]), abs=0.04)
    assert drawn(50) == drawn(50) != drawn(50, seed=6)
    assert drawn(50, seed=-1) != drawn(50, seed=-1)
    assert drawn(50, seed=None) != drawn(50, seed=None)


def test_a_bias_moves_a_token() -> None:
    last = ranked()[-1]
    assert set(drawn(20, temperature=0, logit_bias={last: 100.0})) == {last}
    assert drawn(1, temperature=0, logit_bias={ranked()[0]: -100.0}) == [ranked()[1]]


def test_frequency_and_presence_count_the_answer_only() -> None:
    """Greedy by hand: the likeliest after taking off what its count costs."""
    for frequency, presence in ((0.7, 0.0), (0.0, 1.5), (0.4, 0.9), (-0.5, 0.0)):
        scores, wanted, counts = LOGITS.clone(), [], Counter[int]()
        for _ in range(30):
            penalised = scores.clone()
            for token, count in counts.items():
                penalised[token] -= frequency * count + presence
            wanted.append(int(penalised.argmax()))
            counts[wanted[-1]] += 1
        options = {"temperature": 0, "frequency_penalty": frequency, "presence_penalty": presence}
        assert drawn(30, prompt=(ranked()[0],), **options) == wanted


def test_repetition_counts_the_prompt_as_well() -> None:
    first, second = ranked()[:2]
    assert drawn(1, temperature=0, repetition_penalty=50.0) == [first]
    assert drawn(2, prompt=(first, first), temperature=0, repetition_penalty=50.0)[0] == second
    assert len(set(drawn(10, temperature=0, repetition_penalty=50.0))) == 10


def test_no_probability_at_all_leaves_the_likeliest() -> None:
    assert set(drawn(20, top_p=0.0, temperature=5.0)) == {ranked()[0]}


def test_a_window_is_what_all_penalties_count() -> None:
    """Greedy by hand over the last tokens of prompt and answer together."""
    likely = ranked()
    for window in (0, 1, 3, 100):
        text, options = [likely[0], likely[1], likely[0]], {"frequency_penalty": 0.6, "presence_penalty": 0.4}
        prompt = tuple(text)
        for _ in range(12):
            scores = LOGITS.clone()
            for token, count in Counter(text[-window:] if window else []).items():
                scores[token] = scores[token] / 1.5 if scores[token] > 0 else scores[token] * 1.5
                scores[token] -= 0.6 * count + 0.4
            text.append(int(scores.argmax()))
        assert drawn(12, prompt, temperature=0, repetition_penalty=1.5, penalty_window=window, **options) == text[3:]


def test_what_is_forbidden_is_never_drawn() -> None:
    draw = Sampler(Sampling(temperature=2.0, seed=1, logit_bias={ranked()[0]: 100.0}), (), ranked()[:30])
    assert {draw(LOGITS).token for _ in range(100)} <= set(ranked()[30:])
    assert Sampler(Sampling(temperature=2.0), (), range(VOCABULARY))(LOGITS).token in range(VOCABULARY)


def test_logprobs_are_the_models_own_whatever_is_done_to_the_logits() -> None:
    options = {"temperature": 0.3, "logit_bias": {ranked()[5]: 100.0}, "num_logprobs": 2, "seed": 1, "top_p": 1.0}
    told = Sampler(Sampling(**options))(LOGITS)  # type: ignore[arg-type]
    expected = LOGITS.log_softmax(-1)
    assert told.token == ranked()[5]
    assert told.logprob == pytest.approx(float(expected[told.token]))
    assert [token for token, _ in told.likeliest] == ranked()[:2]
    assert [logprob for _, logprob in told.likeliest] == pytest.approx(expected[ranked()[:2]].tolist())
    assert Sampler(Sampling(num_logprobs=0))(LOGITS).likeliest == ()
    assert Sampler(Sampling())(LOGITS).logprob is None


def test_logits_stay_as_they_are() -> None:
    before = LOGITS.clone()
    drawn(5, prompt=(1, 2), repetition_penalty=1.3, frequency_penalty=1.0, logit_bias={3: 5.0}, top_k=4, min_p=0.1)
    assert torch.equal(LOGITS, before)


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = Tokenizer(models.BPE({character: number for number, character in enumerate(ALPHABET)}, []))
BYTES.decoder = decoders.ByteLevel()


@given(st.text(max_size=20), st.binary(max_size=4))
def test_pieces_are_whole_characters_and_together_the_text(text: str, rubbish: bytes) -> None:
    """One token a byte; what is no character at the end comes as U+FFFD."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [ALPHABET.index(character) for piece, _ in pre.pre_tokenize_str(text) for character in piece]
    pieces = IncrementalDetokenizer(BYTES)
    said = [pieces.step(token) for token in ids]
    assert "".join(said) + pieces.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in said)
    more = IncrementalDetokenizer(BYTES)
    tokens = [*ids, *range(len(rubbish))]
    assert "".join(map(more.step, tokens)) + more.flush() == BYTES.decode(tokens)
    assert more.flush() == ""
