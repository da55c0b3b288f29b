"""Conversations that another process goes on from: as if nothing had ended in between, or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrimoe_kt.engine.memory import kept_files
from hybrimoe_kt.engine.memory.host_copy import HostCopy
from hybrimoe_kt.engine.memory.kept_files import KeptFiles
from hybrimoe_kt.engine.memory.layer_states import LayerStates
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.captured_steps import EXACT
from tests.support.generated_model import GeneratedModel, Shape

from .families import random_model, save_checkpoint
from .test_equality import SHAPES
from .test_prefix_cache import PLACES, Agent, answer, generator, text

Make = Callable[[Shape], GeneratedModel]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["qwen3moe", "deepseek3", "qwen3next"])
def test_another_process_goes_on_where_one_ended(generated: Make, tmp_path: Path, name: str, place: str) -> None:
    """Whatever layers keep; with recurrent states also from an earlier turn and from the system message."""
    model = generated(SHAPES[name])
    alone = generator(model, place, cache_ram=0)
    system = text(0, 30)
    agents = [Agent(number, system, [7, 9], thoughts=2) for number in range(1, 4)]
    for _ in range(2):
        made = generator(model, place)
        restored = made.restore_kept(tmp_path)
        assert restored == (0 if not files(tmp_path) else len(made.kept))
        for agent in agents:
            agent.turn(made, alone, 12)
        sizes: list[int] = []
        assert made.save_kept(tmp_path, sizes.append) == len(made.kept) == len(sizes)
    new, computed = (sum(getattr(agent, each) for agent in agents) for each in ("num_new", "num_computed"))
    assert computed <= new - 2 * len(system) + 6 * 2
    agents.append(Agent(9, system, [7, 9], thoughts=2))
    made = generator(model, place)
    made.restore_kept(tmp_path)
    agents[-1].turn(made, alone, 12)
    assert made.last_run()["reused_tokens"] >= len(system)


@pytest.mark.parametrize("kept", ["q8_0", "f16", "f32"])
def test_keys_and_values_come_back_as_they_were_kept(generated: Make, tmp_path: Path, kept: str) -> None:
    model, prompt = generated(SHAPES["qwen3moe"]), text(1, 60)
    for place in ("graphs", "modules"):
        made = generator(model, place, kv_cache_type=kept)
        said = answer(made, prompt, 3)
        wanted = answer(made, [*prompt, *said, 3, 4], 5)
        other = generator(model, place, kv_cache_type=kept)
        answer(other, prompt, 3)
        other.save_kept(tmp_path / place)
        again = generator(model, place, kv_cache_type=kept)
        assert again.restore_kept(tmp_path / place) == 1
        assert answer(again, [*prompt, *said, 3, 4], 5) == wanted
        assert again.last_run()["reused_tokens"] >= 62


def test_only_the_same_model_goes_on(generated: Make, tmp_path: Path) -> None:
    """Not one with other weights, nor the same with keys in another type, nor another version of the package."""
    one = generator(generated(SHAPES["qwen3moe"]), "graphs")
    answer(one, text(1, 40), 2)
    one.save_kept(tmp_path)
    others = [
        generator(generated(SHAPES["deepseek3"]), "graphs"),
        generator(generated(SHAPES["qwen3moe"]), "graphs", kv_cache_type="f32"),
        generator(generated(SHAPES["qwen3moe"]), "modules"),
    ]
    assert [other.restore_kept(tmp_path) for other in others] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 4
    assert generator(generated(SHAPES["qwen3moe"]), "graphs").restore_kept(tmp_path) == 1


def test_weights_tell_files_of_one_size_apart(generated: Make, tmp_path: Path) -> None:
    made = generator(generated(SHAPES["qwen3moe"]), "graphs")
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(10**6))
    seen = set()
    for place in (None, 0, 4000, 999_999):
        if place is not None:
            with weights.open("r+b") as file:
                file.seek(place)
                file.write(b"x")
        seen.add(kept_files.identity([weights], {}, made.model.config, made.new_cache(), ("f16",)))
    assert len(seen) == 4
    assert kept_files.identity([weights], {}, made.model.config, made.new_cache(), ("f32",)) not in seen
    weights.write_bytes(b"")
    kept_files.identity([weights], {}, made.model.config, made.new_cache(), ())


def test_rotary_scaling_is_part_of_the_model(generated: Make, tmp_path: Path) -> None:
    """It comes from the file, or from what stands in its metadata's place, and is not in the configuration."""
    model, prompt = generated(SHAPES["qwen3moe"]), text(1, 120)
    one = generator(model, "graphs")
    said = answer(one, prompt, 3)
    one.save_kept(tmp_path)
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    changed = {f"qwen3moe.rope.scaling.{key}": value for key, value in scaling.items()}
    loaded = load_model(
        model.path, option_overrides={"accelerator": "none", "cpu_backend": "ggml"}, metadata=changed, device="cpu",
        progress=False,
    )  # fmt: skip
    other = TokenGenerator(loaded, set(), cache_ram=2**30)
    assert other.restore_kept(tmp_path) == 0
    wanted = answer(other, [*prompt, *said, 5], 6)
    assert wanted != answer(one, [*prompt, *said, 5], 6), "it makes a difference"


def copies(*sizes: int) -> list[HostCopy]:
    return [
        HostCopy([number] * 3, 2, [LayerStates(3, (torch.full((size,), number),), torch.device("cpu"))], {}, True)
        for number, size in enumerate(sizes)
    ]


def test_the_oldest_go_where_there_are_too_many(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path, "model")
    assert kept.save(copies(1000, 1000, 1000), 10**6) == 3
    assert [copy.ids[0] for copy in kept.load()] == [0, 1, 2]
    before = {path: path.stat().st_ino for path in files(tmp_path)}
    first, second, third = copies(1000, 1000, 1000)
    assert kept.save([second, third, first], 18_000) == 2, "two of some 8 KB"
    assert [copy.ids[0] for copy in kept.load()] == [2, 0]
    assert all(before[path] == path.stat().st_ino for path in files(tmp_path)), "what is there is not written again"
    assert kept.save(copies(10**5), 10) == 1, "the latest stays"


def test_what_has_become_longer_takes_the_place_of_what_it_was(tmp_path: Path) -> None:
    """Of this process's; what another has written meanwhile stays."""
    KeptFiles(tmp_path, "model").save(copies(10, 20), 10**6)
    kept = KeptFiles(tmp_path, "model")
    first, second = kept.load()
    KeptFiles(tmp_path, "model").save(copies(10, 10, 10)[2:], 10**6)
    first.ids.append(7)
    first.states[0] = LayerStates(4, (torch.zeros(10),), torch.device("cpu"))
    assert kept.save([second, first], 10**6) == 2
    assert {tuple(copy.ids) for copy in kept.load()} == {(0, 0, 0, 7), (1, 1, 1), (2, 2, 2)}


def test_what_did_not_fit_stays_in_its_file(generated: Make, tmp_path: Path) -> None:
    """A run with less memory for them takes none away."""
    model = generated(SHAPES["qwen3moe"])
    made = generator(model, "graphs")
    for seed in range(3):
        answer(made, text(seed, 20), 2)
    made.save_kept(tmp_path)
    small = generator(model, "graphs", cache_ram=0)
    assert small.restore_kept(tmp_path) == 1
    answer(small, text(7, 20), 2)
    small.save_kept(tmp_path)
    assert generator(model, "graphs").restore_kept(tmp_path) >= 3


def test_the_same_tokens_with_other_marks_are_another_file(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path, "model")
    (copy,) = copies(10)
    kept.save([copy], 10**6)
    (loaded,) = kept.load()
    loaded.marks[2] = [None]
    kept.save([loaded], 10**6)
    assert [copy.marks for copy in kept.load()] == [{2: [None]}]


def test_two_that_save_at_once_do_not_stumble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a file that the other has just removed."""
    kept = KeptFiles(tmp_path, "model")
    kept.save(copies(10, 10), 10**6)
    paths = kept._paths()

    def gone() -> list[Path]:
        paths[0].unlink(missing_ok=True)
        return paths

    monkeypatch.setattr(kept, "_paths", gone)
    assert kept.save(copies(10, 10)[1:], 10**6) == 1


@pytest.mark.parametrize("name", ["deepseek4", "minimax-m3"])
def test_models_whose_conversations_cannot_be_copied_say_so(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(name, random_model(name), tmp_path)
    loaded = load_model(folder, device="emulated:0", option_overrides=EXACT, progress=False)
    made = TokenGenerator(loaded, set(), cache_ram=2**30, captures=False)
    answer(made, text(1, 20), 2)
    assert not made.can_save_kept
    assert made.save_kept(tmp_path / "kept") == 0


def test_only_its_owner_reads_them(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "new", "model")
    kept.save(copies(10), 10**6)
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path / "new")] == [0o600]


def changed(path: Path, **changes: object) -> None:
    """Another text in the metadata."""
    tensors = load_file(path)
    with kept_files.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["hybrimoe_kt"])
    path.unlink()
    save_file(tensors, path, {"hybrimoe_kt": json.dumps(about | changes)})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(500)),
        lambda path: save_file({"one": torch.zeros(3)}, path),
        lambda path: changed(path, format=99),
        lambda path: changed(path, ids=[]),
        lambda path: changed(path, ids=["a", None]),
        lambda path: changed(path, ids=[1, 2]),
        lambda path: changed(path, states=[{"length": 3}]),
        lambda path: changed(path, states=7),
        lambda path: changed(path, marks=[1]),
        lambda path: changed(path, states=[{"length": 3, "tensors": ["no"], "device": "cpu", "names": []}]),
        lambda path: changed(path, states=[{"length": 3, "tensors": ["layer.0.0"], "device": "nowhere", "names": []}]),
    ],
)
def test_a_broken_file_is_named_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], object]
) -> None:
    kept = KeptFiles(tmp_path, "model")
    kept.save(copies(100, 100), 10**6)
    path = next(path for path in files(tmp_path) if kept_files._digest(copies(100)[0]) in path.name)
    spoil(path)
    assert [copy.ids[0] for copy in kept.load()] == [1]
    (told,) = caplog.messages
    assert str(path) in told and "left alone" in told
    assert path.exists()
    assert kept.save(copies(100, 100), 10**6) == 2
    assert [copy.ids[0] for copy in KeptFiles(tmp_path, "model").load()] == [0, 1], "written anew"


def test_what_cannot_be_written_is_said_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptFiles(tmp_path, "model")

    def full(tensors: object, path: Path, about: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_files, "save_file", full)
    with pytest.raises(ConfigError, match="No space left on device; give another folder, or a smaller --cache_ram"):
        kept.save(copies(100), 10**6)
    assert files(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="conversations cannot be kept there"):
        KeptFiles(tmp_path / "file", "model")


def test_what_somebody_left_half_written_goes_in_the_end(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path, "model")
    old, new = (kept.folder / f"{name}.safetensors.1.part" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    kept.save(copies(10), 10**6)
    assert not old.exists() and new.exists() and len(kept.load()) == 1
