"""Ways to wait, on devices that are pretended; and, emulated, in captured work that is replayed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.shares import probe as trial
from hybrimoe_kt.device.shares.driver_waits import DriverWaits
from hybrimoe_kt.device.shares.host_waits import HostFunctionWaits, SpinningWaits
from hybrimoe_kt.device.shares.kernel_waits import KernelWaits
from hybrimoe_kt.device.shares.service import ShareService
from hybrimoe_kt.device.shares.stream_waits import choose_wait
from hybrimoe_kt.device.shares.words import SharePosts, naive_post
from hybrimoe_kt.device.step_graph import opaque
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import DeadlineError, KernelError
from tests.device.shares.pretended import (
    SHIFT,
    PretendedDevice,
    PretendedDriver,
    PretendedRuntime,
    Status,
    pretended,
    pretended_kernel,
)

NO_ADDRESS = {"cuMemHostGetDevicePointer": Status.CUDA_ERROR_INVALID_VALUE}
NO_WAIT = {"cuStreamWaitValue32": Status.CUDA_ERROR_NOT_SUPPORTED}


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with pretended() as made:
        yield made


@pytest.fixture(autouse=True)
def quick_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_ENDS_WITHIN_S", 0.3)


def posts_on(accelerator: ImmediateAccelerator, layers: int = 3) -> SharePosts:
    form = {"hidden": 8, "hidden_dtype": torch.float32, "top_k": 2, "answers_pairs": False}
    return SharePosts(accelerator, range(layers), **form)  # type: ignore[arg-type]


def test_the_driver_is_asked_to_wait_for_the_words_own_address(device: PretendedDevice) -> None:
    driver = PretendedDriver(device)
    way, posts = DriverWaits(driver), posts_on(device)
    assert way.unusable(device) is None
    waits = [call for call in driver.calls if call[0] == "cuStreamWaitValue32"]
    assert [call[-1] for call in waits] == [False, True], "built before it is captured; then replayed twice"
    driver.calls.clear()
    wait = way.on(device, posts)
    stream = device.stream("any")
    for place in (2, 0):
        wait.wait(stream, place)
    memory, done = posts.memory.data_ptr(), posts.done.data_ptr()
    handle = stream.stream.cuda_stream
    assert driver.calls == [
        ("cuMemHostGetDevicePointer", memory, 0),
        ("cuStreamWaitValue32", handle, done + 8 + SHIFT, 1, 1, False),
        ("cuStreamWaitValue32", handle, done + SHIFT, 1, 1, False),
    ]
    with pytest.raises(AssertionError, match="no place"):
        wait.wait(stream, 3)


def test_the_model_stream_is_the_one_that_is_current(device: PretendedDevice) -> None:
    driver = PretendedDriver(device)
    wait, stream = DriverWaits(driver).on(device, posts_on(device)), device.stream("captured on")
    device.launch(stream, lambda: wait.wait(device.compute, 0), reads=(), writes=(), site="test")
    assert driver.calls[-1][1] == stream.stream.cuda_stream


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"refuses": NO_ADDRESS}, "cuMemHostGetDevicePointer answers CUDA_ERROR_INVALID_VALUE"),
        ({"refuses": NO_WAIT}, "cuStreamWaitValue32 answers CUDA_ERROR_NOT_SUPPORTED"),
        ({"holds": False}, "the stream went on before the word was there"),
        ({"ends": False}, "the stream did not go on within 0.3 s of the word"),
    ],
    ids=["no address", "no wait", "does not hold", "does not end"],
)
def test_a_driver_that_does_not_wait_is_not_taken(device: PretendedDevice, options: Any, reason: str) -> None:
    kept = len(trial._kept)
    assert DriverWaits(PretendedDriver(device, **options)).unusable(device) == reason
    assert device.captured is None, "no capture stays begun"
    assert len(trial._kept) == kept + 1, "what the stream may still read stays"


def test_a_refusal_while_capturing_ends_the_capture(device: PretendedDevice) -> None:
    class SecondThoughts(PretendedDriver):
        def cuStreamWaitValue32(self, *arguments: Any) -> tuple[Any, ...]:
            if device.captured is not None:
                return (Status.CUDA_ERROR_NOT_SUPPORTED,)
            return super().cuStreamWaitValue32(*arguments)

    assert "NOT_SUPPORTED" in str(DriverWaits(SecondThoughts(device)).unusable(device))
    assert device.captured is None


def test_the_driver_is_cudas_and_needs_its_bindings(device: PretendedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("cuda") is None:
        assert "install hybrimoe-kt[cuda-bindings]" in str(DriverWaits().unusable(device))
    assert DriverWaits(PretendedDriver(device)).unusable(ImmediateAccelerator()) == "CUDA's only"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert DriverWaits(PretendedDriver(device)).unusable(device) == "CUDA's only"


def test_a_kernel_waits_and_ends_itself(device: PretendedDevice) -> None:
    way = KernelWaits(pretended_kernel(device), 0.01)
    assert KernelWaits(pretended_kernel(device), 60.0).unusable(device) is None
    posts, event = posts_on(device), device.event()
    posts.clear_done(1)
    stream = device.stream("any")
    way.on(device, posts).wait(stream, 1)
    stream.record(event, "test")
    Deadline(10).wait(event.is_done, "the kernel")
    assert posts.has_timed_out


def test_a_kernel_that_does_not_look_again_is_not_taken(device: PretendedDevice) -> None:
    launch = pretended_kernel(device, is_hoisted=True)
    assert KernelWaits(launch, 60.0).unusable(device) == "the stream went on before the word was there"


def test_a_kernel_looks_for_as_long_as_the_deadline_but_within_an_int32() -> None:
    asked: list[int] = []
    with pretended() as device:
        for deadline_s in (1e-9, 2.5, 1e6):
            way = KernelWaits(lambda words, place, timed_out, polls: asked.append(polls), deadline_s)
            way.on(device, posts_on(device)).wait(device.compute, 0)
    assert asked == [1, 2_500_000, 2**31 - 1]


@pytest.mark.parametrize("hip", [None, "7.0"], ids=["cuda", "hip"])
def test_a_function_on_the_host_waits(
    device: PretendedDevice, monkeypatch: pytest.MonkeyPatch, hip: str | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    runtime = PretendedRuntime(device)
    assert HostFunctionWaits(10.0, runtime).unusable(device) is None
    assert runtime.streams == [101, 101], "once before it is captured, once captured"
    assert HostFunctionWaits(10.0, PretendedRuntime(device, 999)).unusable(device) == (
        f"{'hip' if hip else 'cuda'}LaunchHostFunc answers 999"
    )


def test_a_function_on_the_host_waits_for_its_own_word_and_ends_itself(device: PretendedDevice) -> None:
    posts, event, stream = posts_on(device), device.event(), device.stream("any")
    posts.clear_done(2)
    wait = HostFunctionWaits(10.0, PretendedRuntime(device)).on(device, posts)
    wait.wait(stream, 0)
    stream.record(event, "test")
    Deadline(5).wait(event.is_done, "a word that is there")
    wait.wait(stream, 2)
    stream.record(event, "test")
    time.sleep(0.02)
    assert not event.is_done()
    posts.set_done(2)
    Deadline(5).wait(event.is_done, "the word")
    assert not posts.has_timed_out
    posts.clear_done(1)
    HostFunctionWaits(0.02, PretendedRuntime(device)).on(device, posts).wait(stream, 1)
    stream.record(event, "test")
    Deadline(5).wait(event.is_done, "the bound")
    assert posts.has_timed_out


def test_ways_are_tried_in_order_and_all_reasons_told(device: PretendedDevice) -> None:
    posts = posts_on(device)
    refused, runtime = DriverWaits(PretendedDriver(device, refuses=NO_WAIT)), PretendedRuntime(device)
    ways = [refused, KernelWaits(pretended_kernel(device), 60.0), HostFunctionWaits(60.0, runtime)]
    chosen = choose_wait(device, posts, ways=ways)
    assert chosen.wait is not None and chosen.wait.name == "a kernel that polls"
    assert chosen.reasons == (
        "the driver's wait for a value in memory: cuStreamWaitValue32 answers CUDA_ERROR_NOT_SUPPORTED",
    )
    assert not runtime.streams, "not tried"
    none = choose_wait(device, posts, ways=[refused, KernelWaits(None, 60.0), HostFunctionWaits(60.0, object())])
    assert none.wait is None
    assert [reason.partition(":")[0] for reason in none.reasons] == [
        "the driver's wait for a value in memory",
        "a kernel that polls",
        "a function on the host",
    ]
    assert "hybrimoe-kt[cuda]" in none.reasons[1]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a runtime library here")
def test_what_is_tried_where_nobody_says(device: PretendedDevice) -> None:
    posts = posts_on(device)
    chosen = choose_wait(device, posts, launch=pretended_kernel(device))
    assert chosen.wait is not None and chosen.wait.name == "a kernel that polls"
    none = choose_wait(device, posts)
    assert none.wait is None and len(none.reasons) == 3
    assert "torch's runtime library is not found" in none.reasons[2]


def test_without_captures_nothing_is_tried() -> None:
    with pretended(captures=False) as device:
        assert "nothing captures" in str(DriverWaits(PretendedDriver(device)).unusable(device))


class _Doubling(TorchReferenceCpu):
    answers_pairs = False
    name = "doubling"

    def compute(self, layer: int, routed: Any) -> torch.Tensor:
        return routed.hidden * 2 + layer


def test_emulated_a_captured_token_waits_at_every_replay() -> None:
    accelerator = ImmediateAccelerator()
    posts = posts_on(accelerator)
    chosen = choose_wait(accelerator, posts, deadline_s=10.0)
    assert chosen.wait is not None and chosen.wait.name == SpinningWaits.name and chosen.reasons == ()
    service, capture = ShareService(posts, _Doubling(), Deadline(10.0)), accelerator.capture()
    assert capture is not None
    hidden, ids, weights = torch.ones(8), torch.tensor([1, -1]), torch.ones(2)
    service.open()
    capture.begin()
    state = hidden + 0
    for layer in range(3):
        opaque(lambda layer=layer, state=state: naive_post(posts, layer, state, ids, weights))
        chosen.wait.wait(accelerator.compute, layer)
        state = posts.outbox + 0
    graph = capture.end()
    service.close_step()
    assert service.failure() is None
    for value in (3.0, -7.0):
        hidden.fill_(value)
        service.open()
        graph.replay()
        service.close_step()
        assert service.failure() is None
        assert torch.equal(state, torch.full((8,), ((value * 2) * 2 + 1) * 2 + 2))
    service.stop()


def test_emulated_a_wait_that_nobody_ends_ends_itself_and_the_token_is_lost() -> None:
    accelerator = ImmediateAccelerator()
    posts = posts_on(accelerator)
    chosen = choose_wait(accelerator, posts, deadline_s=0.05)
    assert chosen.wait is not None
    service = ShareService(posts, _Doubling(), Deadline(10.0))
    service.open()
    for layer in range(3):
        posts.clear_done(layer)  # and nothing is asked
        chosen.wait.wait(accelerator.compute, layer)
    service.close_step()
    assert isinstance(service.failure(), DeadlineError) and not service.is_dead
    service.open()
    naive_post(posts, 1, torch.ones(8), torch.tensor([0, 1]), torch.ones(2))
    chosen.wait.wait(accelerator.compute, 1)
    assert posts.outbox.tolist() == [3.0] * 8
    service.close_step()
    assert service.failure() is None
    service.stop()
    with pytest.raises(KernelError, match="stopped"):
        service.open()
