"""The CPU's choice of its expert backend: by layer, by load, by what was measured, and without any library."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from hybrimoe_kt.backends import cpu_auto, kt_kernel_pool
from hybrimoe_kt.backends.cpu_auto import AutoBackend
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.cli import calibrate as command
from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.calibrate import COMPARED_LOADS, calibrate
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.profiles import load_profile
from hybrimoe_kt.quants import TYPES
from tests.support.expert_layers import EXPERTS, MAX_TOKENS, TOP_K, answers, layer, reference, step
from tests.support.random_blocks import Type

Kinds = dict[str, type[CpuBackend]]


class Scripted(TorchReferenceCpu):
    """Answers as the reference does, and notes who was asked for what."""

    asked: ClassVar[list[tuple[str, int, int]]] = []
    only: ClassVar[set[int] | None] = None
    """Layers that it takes; None: all."""
    padded: ClassVar[set[int]] = set()
    why_not: ClassVar[str | None] = None

    def __init__(self, num_threads: int = 0, max_tokens: int = 0) -> None:
        super().__init__(num_threads, max_tokens)
        self.num_threads = num_threads
        self.layers: list[int] = []

    @classmethod
    def unusable(cls) -> str | None:
        return cls.why_not

    @classmethod
    def refuses(cls, experts: LayerExperts) -> str | None:
        return f"{cls.name} has no kernel" if cls.only is not None and experts.layer not in cls.only else None

    @classmethod
    def copied_bytes(cls, experts: LayerExperts) -> int:
        return 7 if experts.layer in cls.padded else 0

    def copies(self, layer: int) -> bool:
        return layer in self.padded

    def add_layer(self, experts: LayerExperts) -> None:
        super().add_layer(experts)
        self.layers.append(experts.layer)

    def submit(self, layer: int, routed: Routed) -> None:
        Scripted.asked.append((self.name, layer, len(routed.hidden)))
        super().submit(layer, routed)


def scripted(name: str, **attributes: Any) -> type[CpuBackend]:
    made: type[CpuBackend] = type("Made", (Scripted,), {"name": name, **attributes})
    return made


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kinds]:
    """The candidates, in order of preference; a test puts its own in."""
    found: Kinds = {"first": scripted("first"), "second": scripted("second")}
    monkeypatch.setattr(cpu_auto, "_KINDS", found)
    Scripted.asked.clear()
    cpu_auto._warn_once.cache_clear()
    yield found
    cpu_auto._warn_once.cache_clear()


def auto(*numbers: int, max_tokens: int = 512) -> AutoBackend:
    backend = AutoBackend(3, max_tokens)
    for number in numbers:
        backend.add_layer(layer(number=number))
    return backend


def chosen(backend: AutoBackend, number: int = 0) -> dict[int, str]:
    """Tokens an expert has -> who is asked."""
    Scripted.asked.clear()
    for load in COMPARED_LOADS:
        tokens = 1 if load == 1 else -(-load * EXPERTS // TOP_K)
        answers(backend, layer(number=number), *step(tokens, skipped=0))
    return {load: name for load, (name, _, _) in zip(COMPARED_LOADS, Scripted.asked, strict=True)}


def test_the_preferred_one_computes_while_nothing_is_measured(kinds: Kinds) -> None:
    backend, inputs = auto(0), step(5)
    torch.testing.assert_close(answers(backend, layer(), *inputs), reference(layer(), *inputs))
    assert chosen(backend) == dict.fromkeys(COMPARED_LOADS, "first")
    assert backend.describe() == "auto: first"
    assert AutoBackend.serves(layer()) == "first"


def test_what_was_measured_decides_by_load(kinds: Kinds) -> None:
    backend = auto(0)
    slow_then_fast = {1: 2.0, 2: 2.0, 8: 1.0, 32: 1.0, 128: 1.0}
    backend.choose({"first": dict.fromkeys(COMPARED_LOADS, 1.5), "second": slow_then_fast, "nobody": {1: 0.0}})
    assert chosen(backend) == {1: "first", 2: "first", 8: "second", 32: "second", 128: "second"}
    assert backend.describe() == "auto: first up to 7 tokens an expert, second from 8, measured"
    inputs = step(300)
    torch.testing.assert_close(answers(backend, layer(), *inputs), reference(layer(), *inputs))


def test_a_load_without_a_measurement_stays_with_the_preferred(kinds: Kinds) -> None:
    backend = auto(0)
    backend.choose({"second": {8: 1.0}})
    assert chosen(backend) == {1: "first", 2: "first", 8: "second", 32: "first", 128: "first"}
    assert backend.describe() == ("auto: first up to 7 tokens an expert, second up to 31, first from 32, measured")


@pytest.mark.parametrize("tokens", [1, 2, 5, 20, 21, 22, 85, 86, 341, 342, 500])
def test_the_load_is_what_an_expert_has_on_average(kinds: Kinds, tokens: int) -> None:
    """One token is measured apart; a prompt never is, however few experts' worth it has."""
    backend = auto(0)
    order = dict(zip(COMPARED_LOADS, "abcde", strict=True))
    kinds |= {name: scripted(name) for name in order.values()}
    seconds = {name: dict.fromkeys(COMPARED_LOADS, 2.0) | {load: 1.0} for load, name in order.items()}
    backend.choose(seconds)
    answers(backend, layer(), *step(tokens, skipped=0))
    load = tokens * TOP_K / EXPERTS
    wanted = 1 if tokens == 1 else next(known for known in (128, 32, 8, 2) if load >= known or known == 2)
    assert Scripted.asked == [(order[wanted], 0, tokens)]


def test_each_layer_has_its_own_choice(kinds: Kinds) -> None:
    kinds["first"] = scripted("first", only={0, 1})
    backend = auto(0, 1, 2)
    backend.choose({"first": dict.fromkeys(COMPARED_LOADS, 2.0), "second": dict.fromkeys(COMPARED_LOADS, 1.0)})
    assert set(chosen(backend, 0).values()) == {"second"}
    fresh = auto(0, 1, 2)
    assert [set(chosen(fresh, number).values()) for number in range(3)] == [{"first"}, {"first"}, {"second"}]
    assert fresh.describe() == "auto: first; second"


def test_candidates_have_the_layers_that_they_may_compute(kinds: Kinds) -> None:
    kinds |= {"first": scripted("first", only={0, 2}), "second": scripted("second", padded={2})}
    backend = auto(0, 1, 2)
    found = backend.candidates()
    assert {name: sorted(made.layers) for name, made in found.items()} == {"first": [0, 2], "second": [0, 1]}  # type: ignore[attr-defined]
    assert backend.candidates() == found, "made once"
    backend.choose({name: dict.fromkeys(COMPARED_LOADS, 1.0) for name in found})
    assert {name: sorted(made.layers) for name, made in found.items()} == {"first": [0, 2], "second": [0, 1]}  # type: ignore[attr-defined]


def test_no_copy_is_made_where_one_reads_in_place(kinds: Kinds) -> None:
    """However fast the copy would be; alone, the backend that copies is taken."""
    kinds["second"] = scripted("second", padded={0})
    backend = auto(0)
    backend.choose({"first": dict.fromkeys(COMPARED_LOADS, 9.0), "second": dict.fromkeys(COMPARED_LOADS, 1.0)})
    assert set(chosen(backend).values()) == {"first"}
    assert not backend.copies(0)
    assert AutoBackend.copied_bytes(layer()) == 0
    kinds["first"] = scripted("first", why_not="it is missing")
    alone = auto(0)
    assert set(chosen(alone).values()) == {"second"}
    assert alone.copies(0)
    assert AutoBackend.copied_bytes(layer()) == 7


def test_one_warning_says_why_plain_torch_computes(kinds: Kinds, caplog: pytest.LogCaptureFixture) -> None:
    kinds |= {"first": scripted("first", why_not="first is missing"), "second": scripted("second", only=set())}
    with caplog.at_level(logging.WARNING):
        backend = auto(0, 1, 2)
    (warning,) = caplog.messages
    assert "many times slower: first is missing; second has no kernel" in warning
    assert backend.describe() == "auto: torch_reference" and backend.candidates() == {}
    inputs = step(4)
    assert torch.equal(answers(backend, layer(), *inputs), reference(layer(), *inputs))
    backend.choose({})
    assert backend.describe() == "auto: torch_reference"


def test_its_types_are_what_any_computes(kinds: Kinds) -> None:
    one, other = TYPES[Type.Q4_K], TYPES[Type.F16]
    kinds |= {
        "first": scripted("first", types=lambda: (one,)),
        "second": scripted("second", types=lambda: (other, one)),
    }
    assert AutoBackend.types() == (other, one)
    for name in kinds:
        kinds[name] = scripted(name, why_not="it is missing")
    assert AutoBackend.types() == tuple(TYPES.values())


def test_one_call_is_in_flight_whoever_computes_it(kinds: Kinds) -> None:
    """The second would be another backend's, which knows nothing of the first's."""
    backend, inputs = auto(0), step(1)
    backend.choose({"second": {32: 1.0}})
    backend.submit(0, Routed(*inputs))
    with pytest.raises(KernelError, match="still in flight"):
        backend.submit(0, Routed(*step(100)))
    torch.testing.assert_close(backend.wait(), reference(layer(), *inputs))
    torch.testing.assert_close(answers(backend, layer(), *step(100)), reference(layer(), *step(100)))


def test_int32_ids_reach_those_who_take_them(kinds: Kinds) -> None:
    seen: list[torch.dtype] = []

    class Noting(Scripted):
        def submit(self, layer: int, routed: Routed) -> None:
            seen.append(routed.ids.dtype)
            super().submit(layer, routed)

        def compute(self, layer: int, routed: Routed) -> torch.Tensor | None:
            seen.append(routed.ids.dtype)
            return None

    kinds |= {"first": type("Made", (Noting,), {"name": "first", "takes_int32": True}), "second": Noting}
    hidden, ids, weights = step(1, skipped=0)
    routed = Routed(hidden, ids.int(), weights)
    for name in kinds:
        backend = auto(0)
        backend.choose({name: {1: 1.0}})
        assert backend.compute(0, routed) is None
        assert torch.equal(answers(backend, layer(), *routed[:3]), reference(layer(), hidden, ids, weights))
    assert seen == [torch.int32, torch.int32, torch.int64, torch.int64]


def test_a_call_that_is_refused_leaves_it_usable(kinds: Kinds) -> None:
    def refuse(self: Any, layer: int, routed: Routed) -> None:
        raise KernelError("too odd")

    backend = auto(0)
    good = kinds["first"].submit
    kinds["first"].submit = refuse  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="too odd"):
        backend.submit(0, Routed(*step(1)))
    kinds["first"].submit = good  # type: ignore[method-assign]
    assert backend.is_done()
    inputs = step(3)
    torch.testing.assert_close(answers(backend, layer(), *inputs), reference(layer(), *inputs))


needs_ggml = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
PADDED = {"kind": Type.Q4_K, "inter": 384, "down": Type.Q5_0}


def _without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_opened", [])
    monkeypatch.setitem(sys.modules, "libggml", None)


@needs_ggml
def test_ggml_computes_what_llamafile_would_have_to_pad() -> None:
    for experts in (layer(**PADDED), layer(Type.MXFP4), layer(Type.Q4_K, up=Type.Q6_K), layer(Type.BF16)):  # type: ignore[arg-type]
        backend = AutoBackend(1, MAX_TOKENS)
        backend.add_layer(experts)
        assert list(backend.candidates()) == ["ggml"]
        backend.choose({"llamafile": {1: 1e-9}, "ggml": {1: 1.0}})
        assert backend.describe() == "auto: ggml, measured"
        inputs = step(5)
        wanted = reference(experts, *inputs)
        assert (answers(backend, experts, *inputs) - wanted).norm() < 0.035 * wanted.norm()
        here = backend.compute(0, Routed(*inputs))
        assert here is not None and torch.equal(here, answers(backend, experts, *inputs))


def test_llamafile_computes_without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
    _without_ggml(monkeypatch)
    for experts in (layer(Type.Q4_K), layer(**PADDED)):  # type: ignore[arg-type]
        backend = AutoBackend(1, MAX_TOKENS)
        backend.add_layer(experts)
        assert backend.describe() == "auto: llamafile"
        assert list(backend.candidates()) == ["llamafile", "llamafile presented twice"]
        for tokens in (1, 9):
            inputs = step(tokens)
            wanted = reference(experts, *inputs)
            assert (answers(backend, experts, *inputs) - wanted).norm() < 0.036 * wanted.norm()
    assert "Q5_1" not in {row.name for row in AutoBackend.types()}


def test_torch_computes_without_any(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    _without_ggml(monkeypatch)
    monkeypatch.setattr(kt_kernel_pool, "unusable", lambda: "kt-kernel is not installed here")
    cpu_auto._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        backend = auto(0, 1)
    cpu_auto._warn_once.cache_clear()
    (warning,) = caplog.messages
    assert "pip install libggml-python" in warning and "kt-kernel is not installed here" in warning
    inputs = step(4)
    assert torch.equal(answers(backend, layer(), *inputs), reference(layer(), *inputs))


def test_calibration_compares_the_candidates_and_the_profile_keeps_it(kinds: Kinds, tmp_path: Path) -> None:
    """The file says what each took, and whoever reads it chooses alike."""
    experts, store = layer(), HostStore()
    store.add(experts)
    backend = auto(0, max_tokens=40)
    found = calibrate(store, 0, backend, None, None, max_tokens=40, repeats=2)
    assert {"first, 1 expert, 1 token", "second, 1 expert, 32 tokens"} <= found.samples.keys()
    profile = load_profile(found.save(tmp_path / "here.json"))
    assert profile.cpu_backends == found.profile.cpu_backends
    assert {name: list(times) for name, times in profile.cpu_backends.items()} == {
        "first": [1, 2, 8, 32],
        "second": [1, 2, 8, 32],
    }
    again = auto(0, max_tokens=40)
    again.choose(profile.cpu_backends)
    assert again.describe() == backend.describe()
    assert again.describe().endswith(", measured")


@needs_ggml
def test_the_command_writes_what_it_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(command, "_random_experts", lambda: layer())
    monkeypatch.setattr(command, "_MAX_TOKENS", 8)
    file = tmp_path / "here.json"
    assert command.main(["--accelerator", "none", "--repeats", "1", "--out", str(file)]) == 0
    compared = json.loads(file.read_text()).get("cpu_backends", {})
    if kt_kernel_pool.unusable() is None:
        assert compared.keys() == {"ggml", "llamafile", "llamafile presented twice"}
        assert compared["llamafile presented twice"].keys() == {"1"}, "of several tokens it is the same as llamafile"
        assert all(compared[name].keys() == {"1", "2", "8"} for name in ("ggml", "llamafile"))
    assert load_profile(file).cpu_backends == {
        name: {int(load): seconds for load, seconds in times.items()} for name, times in compared.items()
    }
