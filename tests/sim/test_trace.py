"""Traces: what goes in comes out, and what cannot be used is refused in one sentence."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sim.generate import generate
from hybrimoe_kt.sim.record import Recorder
from hybrimoe_kt.sim.trace import Trace
from hybrimoe_kt.sim.trace_csv import read_csv
from hybrimoe_kt.sim.trace_file import read_trace, write_trace

TRACES = Path(__file__).parents[1] / "data" / "traces"
HEADER = """\
# route_trace v1
# model=toy.gguf arch=toy n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=1000 dense_bytes=10
# layer=3 expert_bytes=2000 dense_bytes=10
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
PROMPT = "0,0,0,0,0,1,0.7,0,0\n0,0,0,0,1,2,0.3,0,0\n0,0,0,3,0,0,0.9,0,0\n0,0,0,3,1,3,0.1,0,0\n"
SECOND = "0,0,1,0,1,0,0.4,0,0\n0,0,1,0,0,2,0.6,0,0\n0,0,1,3,0,3,0.8,0,0\n0,0,1,3,1,1,0.2,0,0\n"
DECODE = "0,1,2,0,0,3,0.5,0,0\n0,1,2,0,1,0,0.5,0,0\n0,1,2,3,0,1,0.6,0,0\n0,1,2,3,1,2,0.4,0,0\n"


def toy(tmp_path: Path, text: str = HEADER + PROMPT + SECOND + DECODE) -> Path:
    file = tmp_path / "toy.route.csv"
    file.write_text(text, encoding="utf-8")
    return file


def assert_equal(left: Trace, right: Trace) -> None:
    for name in ("model", "layers", "num_experts", "expert_bytes", "steps", "source"):
        assert getattr(left, name) == getattr(right, name), name
    for name in ("experts", "weights", "scores", "predicted", "predicted_scores"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def test_csv_becomes_steps_and_loads(tmp_path: Path) -> None:
    trace = read_csv(toy(tmp_path))
    assert [(step.phase, step.num_tokens) for step in trace.steps] == [("prefill", 2), ("decode", 1)]
    assert trace.layers == (0, 3)
    assert trace.expert_bytes == (1000, 2000)
    prompt = trace.routing(trace.steps[0], 0)
    assert list(prompt.loads.items()) == [(1, 1), (2, 2), (0, 1)], "in the order first met"
    assert prompt.num_tokens == 2
    assert prompt.weights == pytest.approx({1: 0.7, 2: 0.9, 0: 0.4})
    assert trace.routing(trace.steps[1], 1).loads == {1: 1, 2: 1}
    assert trace.routing(trace.steps[1], 1).layer == 3


def test_prefill_may_prune_the_last_layer(tmp_path: Path) -> None:
    pruned = "".join(line + "\n" for line in PROMPT.splitlines() if not line.startswith("0,0,0,3"))
    trace = read_csv(toy(tmp_path, HEADER + pruned + SECOND + DECODE))
    last = trace.routing(trace.steps[0], 1)
    assert last.num_tokens == 1
    assert last.loads == {3: 1, 1: 1}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        pytest.param("", 1, "empty", id="empty"),
        pytest.param(HEADER, 5, "empty", id="no-rows"),
        pytest.param("a,b,c\n1,2,3\n", 1, "wrong header", id="wrong-header"),
        pytest.param(HEADER.replace("n_expert=4", "n_expert=x"), 2, "n_expert", id="broken-comment"),
        pytest.param(HEADER.split("\n", 2)[2], 3, "n_expert_used", id="no-model-line"),
        pytest.param(HEADER + DECODE.replace(",3,0.5", ",9,0.5"), 6, "unknown expert 9; valid: 0 to 3", id="expert"),
        pytest.param(HEADER + DECODE.replace(",3,0.5", ",3,nan"), 6, "not a finite number", id="nan"),
        pytest.param(HEADER + DECODE.replace("0,1,2,3,0", "0,1,2,7,0"), 8, "layer 7", id="unknown-layer"),
        pytest.param(HEADER + DECODE.replace("0,1,2,3,1,2,0.4,0,0\n", ""), 8, "has 1 experts", id="unequal-top-k"),
        pytest.param(HEADER + DECODE[: DECODE.index("0,1,2,3")], 6, "lacks layer 3", id="missing-layer"),
        pytest.param(HEADER + DECODE.replace("0,1,2,3,1,2", "0,1,2,3,1,1"), 9, "twice", id="duplicate"),
        pytest.param(HEADER + DECODE.replace("0,1,2,0,0", "0,5,2,0,0"), 6, "phase 5", id="phase"),
        pytest.param(HEADER + "0,1,2\n", 6, "is not a row", id="short-row"),
    ],
)
def test_bad_csv_names_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    file = toy(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_trace(file)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gemma4-26b-a4b"])
def test_recorded_traces_are_readable(name: str) -> None:
    trace = read_trace(TRACES / f"{name}.npz")
    assert sum(step.phase == "decode" for step in trace.steps) == 128
    assert (trace.num_experts, trace.top_k) == (128, 6)
    assert not trace.synthetic


def test_round_trip_is_exact_and_bytes_are_reproducible(tmp_path: Path) -> None:
    trace = generate("mixtral-8x7b", prompt_tokens=5, tokens=3)
    first, second = write_trace(trace, tmp_path / "a"), write_trace(trace, tmp_path / "b.npz")
    assert_equal(read_trace(first), trace)
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_round_trip_without_optional_arrays(tmp_path: Path) -> None:
    trace = read_csv(toy(tmp_path))
    assert_equal(read_trace(write_trace(trace, tmp_path / "toy")), trace)


def broken(trace: Trace, **changes: object) -> Trace:
    return replace(trace, **changes, _routings={}, _predictions={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda t: {"experts": np.where(t.experts == 3, 99, t.experts)}, "unknown expert 99", id="expert"),
        pytest.param(lambda t: {"scores": np.full_like(t.scores, np.nan)}, "scores of step 0", id="nan-scores"),
        pytest.param(lambda t: {"weights": np.full_like(t.weights, np.inf)}, "weights of token 0", id="inf-weights"),
        pytest.param(lambda t: {"scores": t.scores[:, :1]}, "'scores' has shape", id="shape"),
        pytest.param(lambda t: {"experts": np.full_like(t.experts, -1)}, "lacks layer 0", id="missing-layer"),
        pytest.param(lambda t: {"expert_bytes": (1,)}, "1 expert sizes for 32 layers", id="sizes"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    trace = generate("mixtral-8x7b", prompt_tokens=2, tokens=2)
    with pytest.raises(ConfigError, match=words):
        write_trace(broken(trace, **change(trace)), tmp_path / "bad")
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    missing, zipped, newer = tmp_path / "none.npz", tmp_path / "zip.npz", tmp_path / "newer.npz"
    zipped.write_bytes(b"PK\x03\x04 not really a zip")
    with pytest.raises(ConfigError, match="cannot be opened"):
        read_trace(missing)
    with pytest.raises(ConfigError, match="not a hybrimoe-trace file"):
        read_trace(zipped)
    np.savez(newer, header=np.array('{"format": "hybrimoe-trace", "version": 2}'))
    with pytest.raises(ConfigError, match="version 2"):
        read_trace(newer)
    np.savez(newer, header=np.array('{"format": "other"}'))
    with pytest.raises(ConfigError, match="wrong header"):
        read_trace(newer)


def replayed(trace: Trace) -> Trace:
    """Feed a recorder what a host would see, layer by layer."""
    recorder = Recorder(trace.model, trace.specs(), source=trace.source)
    recorder.begin_request()
    for step in trace.steps:
        rows = slice(step.first_token, step.first_token + step.num_tokens)
        for position, layer in enumerate(trace.layers):
            scores = np.repeat(trace.scores[step.index, position][None], step.num_tokens, axis=0)
            ahead = np.repeat(trace.predicted_scores[step.index, position][:, None], step.num_tokens, axis=1)
            recorder.record(
                layer,
                trace.experts[rows, position].tolist(),
                trace.weights[rows, position],
                scores,
                trace.predicted[rows, position].transpose(1, 0, 2),
                ahead,
            )
    return recorder.trace()


def test_recorder_rebuilds_the_trace() -> None:
    trace = generate("mixtral-8x7b", prompt_tokens=4, tokens=3)
    again = replayed(trace)
    np.testing.assert_array_equal(again.experts, trace.experts)
    np.testing.assert_array_equal(again.predicted, trace.predicted)
    np.testing.assert_allclose(again.scores, trace.scores, rtol=1e-6)
    np.testing.assert_allclose(again.predicted_scores, trace.predicted_scores, rtol=1e-6)
    assert again.steps == trace.steps


def test_recorder_accepts_a_pruned_last_layer_and_saves(tmp_path: Path) -> None:
    recorder = Recorder("toy", [LayerSpec(0, 4, 2, 100), LayerSpec(1, 4, 2, 100)])
    recorder.record(0, [[0, 1], [2, 3]], [[0.5, 0.5], [0.6, 0.4]])
    recorder.record(1, [[1, 3]], [[0.5, 0.5]])
    trace = read_trace(recorder.save(tmp_path / "toy"))
    assert trace.experts[:, 1].tolist() == [[-1, -1], [1, 3]]
    assert trace.steps[0].phase == "prefill"


def test_recorder_refuses_what_it_cannot_use() -> None:
    recorder = Recorder("toy", [LayerSpec(0, 4, 2, 100), LayerSpec(1, 4, 2, 100)])
    with pytest.raises(ConfigError, match="nothing was recorded"):
        recorder.trace()
    with pytest.raises(ConfigError, match="layer 5"):
        recorder.record(5, [[0, 1]], [[0.5, 0.5]])
    recorder.record(0, [[0, 1]], [[0.5, 0.5]])
    with pytest.raises(ConfigError, match="lacks layer 1"):
        recorder.trace()


def test_head_keeps_whole_steps() -> None:
    trace = generate("mixtral-8x7b", prompt_tokens=4, tokens=3)
    short = trace.head(2)
    assert len(short.experts) == 5
    assert short.routing(short.steps[1], 0) == trace.routing(trace.steps[1], 0)


def softmax(rng: np.random.Generator, *shape: int) -> np.ndarray:
    logits = rng.normal(0, 1.5, shape)
    powers = np.exp(logits)
    return powers / powers.sum(axis=-1, keepdims=True)


def test_thousands_of_tokens_with_every_score_fit_in_six_megabytes(tmp_path: Path) -> None:
    rng, tokens, layers = np.random.default_rng(0), 4000, 6
    recorder = Recorder("toy", [LayerSpec(layer, 32, 4, 100) for layer in range(layers)])
    experts = np.argsort(rng.random((tokens, layers, 32)), axis=2)[..., :4]
    weights = softmax(rng, tokens, layers, 4).astype(np.float32)
    scores = softmax(rng, tokens, layers, 32).astype(np.float16)
    ahead = softmax(rng, tokens, layers, 3, 1, 32).astype(np.float16)
    for token in range(tokens):
        for layer in range(layers):
            row, reach = experts[token, layer][None], min(3, layers - 1 - layer)
            predicted = np.repeat(row[None], reach, axis=0) if reach else None
            guessed = ahead[token, layer, :reach] if reach else None
            own = scores[token, layer][None]
            recorder.record(layer, row, weights[token, layer][None], own, predicted, guessed, own)
    recorder.run = {"policy": "lru", "counters": {"hits": 3}}
    file = recorder.save(tmp_path / "long")
    assert file.stat().st_size < 6e6
    again = read_trace(file)
    assert_equal(again, recorder.trace())
    np.testing.assert_array_equal(again.token_scores, scores)
    assert again.run == {"policy": "lru", "counters": {"hits": 3}}
    assert again.head(9).run == {"policy": "lru"}, "the counts are of the whole run"


def test_scores_of_batches_and_of_lone_tokens_come_back_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    recorder = Recorder("toy", [LayerSpec(0, 8, 2, 100), LayerSpec(1, 8, 2, 100)])
    given = []
    for count in (3, 1, 1, 2):
        for layer in range(2):
            scores = softmax(rng, count, 8).astype(np.float16)
            mean = scores.astype(np.float32).mean(axis=0).astype(np.float16)
            recorder.record(layer, [[0, 1]] * count, [[0.5, 0.5]] * count, mean[None], None, None, scores)
            given.append(scores)
    again = read_trace(recorder.save(tmp_path / "mixed"))
    for layer in range(2):
        np.testing.assert_array_equal(again.token_scores[:, layer], np.concatenate(given[layer::2]))
    assert again.head(2).token_scores.shape == (4, 2, 8)


def test_an_unfinished_step_can_be_forgotten() -> None:
    recorder = Recorder("toy", [LayerSpec(0, 4, 2, 100), LayerSpec(1, 4, 2, 100)])
    for layer in (0, 1, 0):
        recorder.record(layer, [[0, 1], [1, 2]], [[0.5, 0.5]] * 2)
    assert recorder.drop_unfinished() == 2
    assert recorder.drop_unfinished() == 0
    assert len(recorder.trace().steps) == 1


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = write_trace(generate("mixtral-8x7b", prompt_tokens=2, tokens=1), tmp_path / "whole").read_bytes()
    file, refusals = tmp_path / "damaged.npz", []
    for number in range(150):
        data = bytearray(whole[: rng.randrange(3, len(whole))] if number % 4 == 0 else whole)
        for _ in range(5):
            data[rng.randrange(2, len(data))] = rng.randrange(256)
        file.write_bytes(data)
        try:
            read_trace(file)
        except ConfigError as error:
            refusals.append(str(error))
    assert len(refusals) > 140
    assert not any("\n" in sentence for sentence in refusals)
