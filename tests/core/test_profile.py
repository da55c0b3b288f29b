"""Profiles: the built-in ones, and one clear sentence for each way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrimoe_kt.core.cost import CostModel
from hybrimoe_kt.core.profile import parse_profile
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.profiles import builtin_profiles, load_profile

GOOD = {
    "hardware": "toy",
    "date": "2026-01-01",
    "measured": "by hand",
    "num_cpu_cores": 2,
    "cpu_call_s": 0.0,
    "cpu_expert_s": 0.0,
    "cpu_single_bytes_per_s": 1e9,
    "cpu_bytes_per_s": 2e9,
    "cpu_macs_per_s": 1e9,
    "cpu_layer_s": 0.0,
}
NUMBERS = [key for key in GOOD if key.startswith(("cpu", "num"))]


def text(**changes: object) -> str:
    data = {**GOOD, "source": dict.fromkeys(NUMBERS, "made up"), **changes}
    return json.dumps({key: value for key, value in data.items() if value is not None})


@pytest.mark.parametrize("name", builtin_profiles())
def test_builtin_profiles_load_and_name_every_source(name: str) -> None:
    profile = load_profile(name)
    assert all(profile.source.values())
    cost = CostModel.from_profile(profile, expert_bytes=4_330_000)
    assert 0 < cost.cpu_s([1]) < cost.cpu_s([1, 1]) < cost.cpu_s([1, 64])
    if profile.has_gpu:
        assert 0 < cost.gpu_s(1) <= cost.gpu_s(4096)
        assert cost.transfer_s(2_000_000) > cost.transfer_s(1_000_000) > 0


def test_the_machines_asked_for_are_there() -> None:
    names = " ".join(builtin_profiles())
    for part in ("default", "cpu-only", "a6000-xeon5220r", "rtx3090", "rtx4090", "rtx5090", "h100"):
        assert part in names
    assert {load_profile(name).num_cpu_cores for name in builtin_profiles()} >= {8, 10, 16, 32, 64}


def test_the_papers_machine_has_its_constants() -> None:
    cost = CostModel.from_profile(load_profile("a6000-xeon5220r"), expert_bytes=4_330_000, expert_macs=8_650_752)
    assert cost.expert_transfer_s == pytest.approx(0.418e-3, rel=0.01)
    assert cost.gpu_s(1) == pytest.approx(0.5e-3, rel=0.01)
    assert cost.cpu_s([1] * 6) == pytest.approx(3e-3, rel=0.02)  # figure 3
    assert cost.cpu_s([1000] * 6) == pytest.approx(120e-3, rel=0.05)  # figure 3
    release = CostModel.from_profile(load_profile("a6000-xeon5220r-release"), expert_bytes=4_330_000)
    assert release.cpu_s([1]) == pytest.approx(1.79e-3, rel=0.01)


def test_a_profile_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text())
    profile = load_profile(file)
    assert (profile.name, profile.has_gpu, profile.num_cpu_cores) == ("mine", False, 2)
    assert load_profile(str(file)) == profile


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "toy.json:1: not JSON"),
        ("[]", "must be a JSON object"),
        (text(cpu_call_s=None), "missing key 'cpu_call_s'"),
        (text(cpu_macs_per_s=-1), "cpu_macs_per_s is -1; it must be > 0"),
        (text(cpu_bytes_per_s=0), "cpu_bytes_per_s is 0; it must be > 0"),
        (text(cpu_call_s=float("nan")), "cpu_call_s is nan; give a finite number"),
        (text(cpu_call_s="fast"), "cpu_call_s is 'fast'; give a finite number"),
        (text(num_cpu_cores=1.5), "give a whole number"),
        (text(cpu_cal_s=1), "unknown key 'cpu_cal_s', did you mean 'cpu_call_s'"),
        (text(gpu_call_s=1e-5), "missing key 'gpu_bytes_per_s'"),
        (text(hardware=""), "hardware is ''"),
        (text(source={}), "source says nothing about 'num_cpu_cores'"),
        (text(cpu_slowdown_while_link_busy=0.5), "must be >= 1"),
        (text(cpu_backends=[]), "cpu_backends must map each backend to seconds by number of tokens"),
        (text(cpu_backends={"ggml": 1e-3}), "cpu_backends must map each backend to seconds by number of tokens"),
        (text(cpu_backends={"ggml": {"few": 1e-3}}), "by number of tokens, which are whole and more than 0"),
        (text(cpu_backends={"ggml": {"0": 1e-3}}), "by number of tokens, which are whole and more than 0"),
        (text(cpu_backends={"ggml": {"-1": 1e-3}}), "by number of tokens, which are whole and more than 0"),
        (text(cpu_backends={"ggml": {"1.5": 1e-3}}), "by number of tokens, which are whole and more than 0"),
        (text(cpu_backends={"ggml": {"²": 1e-3}}), "by number of tokens, which are whole and more than 0"),
        (text(cpu_backends={"ggml": {"8": 0}}), "cpu_backends.ggml.8 is 0; it must be > 0"),
        (text(cpu_backends={"ggml": {"8": "fast"}}), "cpu_backends.ggml.8 is 'fast'; give a finite number"),
        (text(cpu_backends={"ggml": {"8": float("inf")}}), "cpu_backends.ggml.8 is inf; give a finite number"),
        (text(cpu_backend={}), "unknown key 'cpu_backend', did you mean 'cpu_backends'"),
    ],
)
def test_bad_profiles(content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"profile toy\.json") as caught:
        parse_profile(content, name="toy", file="toy.json")
    assert message in str(caught.value)


def test_compared_backends_are_read_by_number_of_tokens() -> None:
    compared = {"ggml": {"1": 1e-3, "128": 0.5}, "a.b:Own": {}}
    profile = parse_profile(text(cpu_backends=compared), name="toy", file="toy.json")
    assert profile.cpu_backends == {"ggml": {1: 1e-3, 128: 0.5}, "a.b:Own": {}}
    assert parse_profile(text(), name="toy", file="toy.json").cpu_backends == {}


def test_unknown_profiles() -> None:
    with pytest.raises(ConfigError, match="did you mean 'a6000-xeon5220r'"):
        load_profile("a6000-xeon522")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile("nowhere/to/be/found.json")


def test_single_token_has_its_own_path() -> None:
    cost = CostModel.from_profile(parse_profile(text(), name="t", file="t"), expert_bytes=1_000_000, expert_macs=1000)
    assert cost.cpu_s([1]) == pytest.approx(1e-3)
    assert cost.cpu_s([2]) == pytest.approx(0.5e-3 + 2e-6)
    assert not cost.has_gpu
