"""The words' memory, and the service case by case: what it answers, refuses, tells, and leaves behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrimoe_kt.backends.registry import cpu_backend
from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.shares import service as module
from hybrimoe_kt.device.shares.service import ShareService
from hybrimoe_kt.device.shares.words import SharePosts, naive_post
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import DeadlineError, KernelError
from tests.support.random_blocks import Type, random_blocks

WIDTH, TOP_K = 8, 3


def posts_for(layers: tuple[int, ...] = (4, 9), **changes: Any) -> SharePosts:
    form = {"hidden": WIDTH, "hidden_dtype": torch.float32, "top_k": TOP_K, "answers_pairs": False}
    return SharePosts(ImmediateAccelerator(), layers, **(form | changes))


class Scripted(CpuBackend):
    """Answers what a function says, in the calling thread or behind `submit`."""

    name, answers_pairs = "scripted", False

    def __init__(self, answer: Callable[[int, Routed], torch.Tensor], *, submits: bool = False) -> None:
        self.answer, self.submits = answer, submits
        self.seen: list[tuple[int, list[int], list[float]]] = []
        self.done = threading.Event()
        self.done.set()

    def add_layer(self, experts: Any) -> None: ...

    def compute(self, layer: int, routed: Routed) -> torch.Tensor | None:
        return None if self.submits else self._answered(layer, routed)

    def submit(self, layer: int, routed: Routed) -> None:
        self._found = self._answered(layer, routed)

    def is_done(self) -> bool:
        return self.done.is_set()

    def wait(self) -> torch.Tensor:
        return self._found

    def _answered(self, layer: int, routed: Routed) -> torch.Tensor:
        self.seen.append((layer, routed.ids[0].tolist(), routed.weights[0].tolist()))
        return self.answer(layer, routed)


def doubled(layer: int, routed: Routed) -> torch.Tensor:
    return routed.hidden * 2 + layer


@pytest.fixture
def serving() -> Iterator[Callable[..., ShareService]]:
    made: list[ShareService] = []

    def serve(posts: SharePosts, cpu: CpuBackend, deadline_s: float = 10.0, **options: Any) -> ShareService:
        made.append(ShareService(posts, cpu, Deadline(deadline_s), **options))
        return made[-1]

    yield serve
    for service in made:
        service.cpu.done.set() if isinstance(service.cpu, Scripted) else None
        service.stop()


def until(condition: Callable[[], bool]) -> None:
    Deadline(10.0).wait(condition, "what a test waits for")


def asks(posts: SharePosts, layer: int, hidden: float = 1.0, ids: tuple[int, ...] = (5, -1, 2)) -> torch.Tensor:
    """Post, wait, and copy the outbox, as a stream does."""
    naive_post(posts, layer, torch.full((WIDTH,), hidden), torch.tensor(ids), torch.tensor([0.5, 9.0, 0.25]))
    until(lambda: posts.is_done(posts.place[layer]))
    return posts.outbox.clone()


# The memory.


@pytest.mark.parametrize("pairs", [False, True], ids=["sum", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_two_parts_share_a_line(pairs: bool, dtype: torch.dtype) -> None:
    posts = posts_for(tuple(range(33)), hidden=70, hidden_dtype=dtype, answers_pairs=pairs)
    parts = [posts.asked, posts.done, posts.timed_out, posts.hidden, posts.ids, posts.weights, posts.outbox]
    shapes = [(33,), (33,), (1,), (70,), (TOP_K,), (TOP_K,), (TOP_K, 70) if pairs else (70,)]
    types = [torch.int32] * 3 + [dtype, torch.int64, torch.float32, torch.float32]
    assert [(tuple(part.shape), part.dtype) for part in parts] == list(zip(shapes, types, strict=True))
    lines: set[int] = set()
    for part in parts:
        first, size = part.data_ptr(), part.numel() * part.element_size()
        mine = set(range(first // 128, (first + size - 1) // 128 + 1))
        assert first % 128 == 0 and not lines & mine
        lines |= mine
        memory = posts.memory.data_ptr()
        assert memory <= first and first + size <= memory + posts.memory.numel()
    assert posts.place == {layer: layer for layer in range(33)}
    assert posts.asked.tolist() == [0] * 33 and posts.done.tolist() == [1] * 33


def test_where_nothing_is_asked_inbox_and_asked_are_left_alone() -> None:
    posts = posts_for()
    naive_post(posts, 9, torch.ones(WIDTH), torch.full((TOP_K,), -1), torch.ones(TOP_K))
    assert not posts.hidden.any() and posts.asked.tolist() == [0, 0] and posts.done.tolist() == [1, 1]
    naive_post(posts, 9, torch.ones(WIDTH), torch.tensor([-1, 0, -1]), torch.ones(TOP_K))
    assert posts.hidden.all() and posts.asked.tolist() == [0, 1] and posts.done.tolist() == [1, 0]
    assert posts.next_asked() == 1 and not posts.is_done(1)


# What is answered.


@pytest.mark.parametrize("submits", [False, True], ids=["computes", "submits"])
def test_shares_are_answered_by_layer_and_told_to_the_log(serving: Any, submits: bool) -> None:
    posts, cpu, told = posts_for(), Scripted(doubled, submits=submits), []
    service = serving(posts, cpu, log=lambda *share: told.append(share))
    before = time.perf_counter()
    for value in (1.0, 2.0):
        service.open()
        for layer in (4, 9):
            assert asks(posts, layer, value).tolist() == [2 * value + layer] * WIDTH
        service.close_step()
        assert service.failure() is None
    assert cpu.seen == [(layer, [5, 2], [0.5, 0.25]) for layer in (4, 9)] * 2, "others' pairs are left out"
    assert [share[:2] for share in told] == [(4, (5, 2)), (9, (5, 2))] * 2
    for _, _, began, ended in told:
        assert before < began <= ended < time.perf_counter()


def test_pairs_keep_their_places(serving: Any) -> None:
    posts = posts_for(answers_pairs=True)
    cpu = Scripted(
        lambda layer, routed: routed.hidden[:, None] * (routed.ids[..., None] + 1) * routed.weights[..., None]
    )
    service = serving(posts, cpu)
    service.open()
    answer = asks(posts, 9)
    service.close_step()
    assert cpu.seen == [(9, [5, -1, 2], [0.5, 9.0, 0.25])]
    assert answer[:, 0].tolist() == [3.0, 0.0, 0.75]


def wide_layers() -> list[LayerExperts]:
    """Two of a width that every library reads."""
    draw, experts, width = np.random.default_rng(5), 8, 256

    def matrix(kind: Type) -> ExpertMatrix:
        data = random_blocks(draw, kind, experts * width, width).reshape(experts, -1)
        return ExpertMatrix(torch.from_numpy(data), int(kind), width, width)

    kinds = (Type.Q8_0, Type.Q4_K)
    return [
        LayerExperts(3 * number, experts, TOP_K, width, width, *(matrix(kind) for _ in range(3)))
        for number, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("name", ["torch_reference", "ggml", "auto", "llamafile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_backend_answers_as_when_it_is_asked_itself(serving: Any, name: str, dtype: torch.dtype) -> None:
    kind = cpu_backend(name)
    if reason := kind.unusable():
        pytest.skip(reason)
    cpu, layers = kind(1, 4), wide_layers()
    posts = SharePosts(
        ImmediateAccelerator(),
        [layer.layer for layer in layers],
        hidden=layers[0].hidden,
        hidden_dtype=dtype,
        top_k=TOP_K,
        answers_pairs=cpu.answers_pairs,
    )
    hidden = torch.randn(layers[0].hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids, weights = torch.tensor([6, -1, 0]), torch.tensor([0.75, 0.5, 0.25])
    wanted = []
    for layer in layers:
        cpu.add_layer(layer)
        cpu.submit(layer.layer, Routed(hidden.float()[None], ids[None], weights[None]))
        until(cpu.is_done)
        wanted.append(cpu.wait()[0].clone())
    service = serving(posts, cpu)
    service.open()
    for layer, right in zip(layers, wanted, strict=True):
        naive_post(posts, layer.layer, hidden, ids, weights)
        place = posts.place[layer.layer]
        until(lambda place=place: posts.is_done(place))
        torch.testing.assert_close(posts.outbox, right, rtol=1e-5, atol=1e-6 * float(right.abs().max()))
        assert posts.outbox.any() and posts.outbox.isfinite().all()
    service.close_step()
    assert service.failure() is None


def test_nobody_polls_between_tokens(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    posts, looks = posts_for(), [0]
    look = posts.next_asked

    def counted() -> int:
        looks[0] += 1
        return look()

    monkeypatch.setattr(posts, "next_asked", counted)
    service = serving(posts, Scripted(doubled))
    service.open()
    until(lambda: looks[0] > 3)
    service.close_step()
    time.sleep(0.02)
    at_rest = looks[0]
    time.sleep(0.05)
    assert looks[0] == at_rest
    service.open()
    until(lambda: looks[0] > at_rest + 3)
    service.close_step()


# What fails.


def broken(layer: int, routed: Routed) -> torch.Tensor:
    if layer == 4:
        raise ValueError("a broken kernel\nand more")
    return doubled(layer, routed)


@pytest.mark.parametrize("submits", [False, True], ids=["computes", "submits"])
def test_what_a_backend_raises_ends_the_token_with_zeros_and_the_next_is_served(serving: Any, submits: bool) -> None:
    posts, cpu = posts_for(), Scripted(broken, submits=submits)
    service = serving(posts, cpu)
    service.open()
    posts.outbox.fill_(7.0)
    assert not asks(posts, 4).any()
    posts.outbox.fill_(7.0)
    assert not asks(posts, 9).any() and len(cpu.seen) == 1, "the rest of the token is not computed"
    service.close_step()
    failure = service.failure()
    assert isinstance(failure, KernelError) and not isinstance(failure, DeadlineError)
    assert str(failure) == "the CPU experts' worker (scripted) failed: a broken kernel"
    assert isinstance(failure.__cause__, ValueError)
    service.open()
    assert service.failure() is None and asks(posts, 9).tolist() == [11.0] * WIDTH
    service.close_step()


def loud(*share: Any) -> None:
    raise RuntimeError("a log that is closed")


@pytest.mark.parametrize(
    ("answer", "hidden", "log", "message"),
    [
        (doubled, float("nan"), None, "layer 4 are not finite"),
        (doubled, float("inf"), None, "layer 4 are not finite"),
        (lambda layer, routed: routed.hidden[:, :5], 1.0, None, r"answers \[5\], wanted \[8\]"),
        (doubled, 1.0, loud, "a log that is closed"),
    ],
    ids=["nan", "infinity", "another shape", "log"],
)
def test_it_fails_as_a_kernel_error(serving: Any, answer: Any, hidden: float, log: Any, message: str) -> None:
    posts = posts_for()
    service = serving(posts, Scripted(answer), log=log)
    service.open()
    assert not asks(posts, 4, hidden).any()
    service.close_step()
    with pytest.raises(KernelError, match=message):
        raise service.failure() or AssertionError


def test_a_stream_that_does_not_wait_is_found_out(serving: Any) -> None:
    posts, go_on = posts_for(), threading.Event()

    def late(layer: int, routed: Routed) -> torch.Tensor:
        go_on.wait(10.0)
        return doubled(layer, routed)

    cpu = Scripted(late)
    service = serving(posts, cpu)
    service.open()
    naive_post(posts, 4, torch.ones(WIDTH), torch.tensor([0, 1, 2]), torch.ones(TOP_K))
    until(lambda: bool(cpu.seen))
    threading.Timer(0.05, go_on.set).start()
    service.close_step()
    with pytest.raises(KernelError, match="went on without the CPU's share"):
        raise service.failure() or AssertionError
    assert not service.is_dead, "it came back within its time"


# What does not end.


def test_a_released_token_drains_while_a_call_is_slow_and_the_next_is_served(serving: Any) -> None:
    posts, go_on = posts_for(), threading.Event()

    def slow(layer: int, routed: Routed) -> torch.Tensor:
        go_on.wait(10.0)
        return doubled(layer, routed)

    cpu = Scripted(slow)
    service = serving(posts, cpu)
    service.open()
    naive_post(posts, 4, torch.ones(WIDTH), torch.tensor([0, 1, 2]), torch.ones(TOP_K))
    until(lambda: bool(cpu.seen))
    service.release()
    assert posts.is_done(0), "at once"
    assert not asks(posts, 9).any(), "layers behind it are answered by zeros"
    threading.Timer(0.02, go_on.set).start()
    service.close_step()
    assert isinstance(service.failure(), DeadlineError) and not service.is_dead
    posts.outbox.fill_(7.0)
    time.sleep(0.02)
    assert posts.outbox.tolist() == [7.0] * WIDTH, "its answer went nowhere"
    service.open()
    assert asks(posts, 4, 3.0).tolist() == [10.0] * WIDTH
    service.close_step()
    assert service.failure() is None


def test_a_call_that_does_not_come_back_is_the_last(serving: Any) -> None:
    posts, go_on, kept = posts_for(), threading.Event(), len(module._kept)

    def hang(layer: int, routed: Routed) -> torch.Tensor:
        go_on.wait(10.0)
        return doubled(layer, routed)

    cpu = Scripted(hang)
    service = serving(posts, cpu, deadline_s=0.05)
    service.open()
    naive_post(posts, 4, torch.ones(WIDTH), torch.tensor([0, 1, 2]), torch.ones(TOP_K))
    with pytest.raises(DeadlineError):
        Deadline(0.06).wait(lambda: posts.is_done(0), "the token")
    service.release()
    service.close_step()
    assert service.is_dead and str(service.failure()).startswith("the CPU experts' worker (scripted) did not end")
    assert module._kept[kept:] == [posts], "memory that the call may write to stays"
    with pytest.raises(KernelError, match="restart the program"):
        service.open()
    other = serving(posts, Scripted(doubled))
    other.open()
    posts.outbox.fill_(7.0)
    posts.clear_done(0)
    go_on.set()
    time.sleep(0.03)
    assert posts.outbox.tolist() == [7.0] * WIDTH and not posts.is_done(0), "its late answer reaches no later token"
    assert asks(posts, 9).tolist() == [11.0] * WIDTH
    other.close_step()


def test_a_submitted_call_that_does_not_end_is_given_up_by_the_service_itself(serving: Any) -> None:
    posts, cpu = posts_for(), Scripted(doubled, submits=True)
    cpu.done.clear()
    service = serving(posts, cpu, deadline_s=0.05)
    service.open()
    assert not asks(posts, 4).any() and not asks(posts, 9).any()
    service.close_step()
    assert service.is_dead and isinstance(service.failure(), DeadlineError) and len(cpu.seen) == 1


def test_stopped_in_the_middle_of_a_token_its_waits_still_end(serving: Any) -> None:
    posts, kept = posts_for(), len(module._kept)
    service = serving(posts, Scripted(doubled))
    service.open()
    asks(posts, 4)
    service.stop()
    assert not asks(posts, 9).any()
    assert module._kept[kept:] == [posts]
    service.close_step()
    with pytest.raises(KernelError, match="stopped while a token was under way"):
        raise service.failure() or AssertionError
    with pytest.raises(KernelError, match="has been stopped"):
        service.open()
    service.stop()


def test_release_and_close_mean_nothing_between_tokens(serving: Any) -> None:
    posts = posts_for()
    service = serving(posts, Scripted(doubled))
    service.release()
    service.close_step()
    assert service.failure() is None
    service.open()
    assert asks(posts, 4).tolist() == [6.0] * WIDTH
    service.close_step()


def test_the_interpreter_ends_with_a_token_under_way() -> None:
    code = """
import torch
from tests.device.shares.test_service import Scripted, asks, doubled, posts_for
from hybrimoe_kt.device.shares.service import ShareService
from hybrimoe_kt.device.waiting import Deadline
posts = posts_for()
service = ShareService(posts, Scripted(doubled), Deadline(10.0))
service.open()
print(asks(posts, 4)[0].item())
"""
    root, command = Path(__file__).parents[3], [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=root)
    assert (done.stdout, done.stderr, done.returncode) == ("6.0\n", "", 0)
