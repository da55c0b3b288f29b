"""`python -m benchmarks.on_gpu` without a card: the same code on tiny shapes, and what it does when things go wrong."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import hybrid
from benchmarks.on_gpu import __main__ as on_gpu
from benchmarks.on_gpu import clock, correctness, runner
from benchmarks.on_gpu.__main__ import main
from benchmarks.on_gpu.docs import PAGE, page
from benchmarks.on_gpu.explain import STEPS
from benchmarks.on_gpu.model import CHECKED_TOKENS, METHODS, _row, configurations
from benchmarks.on_gpu.plan import MODELS, Plan, Step, environment, steps_of, visible_card
from benchmarks.on_gpu.results import Results
from hybrimoe_kt.runtime.health import AcceleratorHealth, Health

ROOT = Path(__file__).parents[2]


class Run(NamedTuple):
    """A finished emulated run."""

    code: int
    printed: str
    data: dict[str, Any]
    report: str
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("on_gpu")
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--accelerator", "emulated", "--quick", "--out", str(folder)]
    command += ["--minutes", "8"]  # it takes 25 s of a core; limits of two minutes' worth would be a busy machine's
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    data = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return Run(done.returncode, done.stdout, data, (folder / "report.md").read_text(encoding="utf-8"), folder)


def rows(run: Run, table: str) -> list[dict[str, Any]]:
    return [row for row in run.data["rows"] if row["table"] == table]


def test_every_step_is_run_and_has_rows(run: Run) -> None:
    assert run.code == 0, run.printed
    steps = steps_of(Plan.from_dict(run.data["plan"]))
    assert [step.kind for step in steps] == ["machine", "tests", "link", "kernels", "model", "llama", "clock"]
    for step in steps:
        assert run.data["steps"][step.name]["state"] == "done"
        assert any(row["step"] == step.name for row in run.data["rows"]), step.name
        assert step.title in run.printed
    assert not [row for row in run.data["rows"] if row["state"] in ("failed", "unclean")]


def test_rows_that_make_no_sense_without_a_card_say_so(run: Run) -> None:
    assert {row["state"] for row in rows(run, "llama.cpp") + rows(run, "plans on the clock")} == {"left out"}
    left_out = [row for row in rows(run, "link") if row["state"] == "left out"]
    assert len(left_out) == 4 and all("needs a card" in row["note"] for row in left_out)


def test_the_whole_model_is_right_and_every_configuration_has_a_row(run: Run) -> None:
    checks = rows(run, "right")
    assert len(checks) == 2 * len(CHECKED_TOKENS)
    assert all(row["values"]["worst"] < 1e-5 for row in checks)
    methods = rows(run, "methods")
    assert [row["name"] for row in methods] == [f"{cache}, {method}" for cache, method in configurations()]
    measured = [row for row in methods if row["state"] == "measured"]
    assert len(measured) > len(methods) // 2, "even a busy machine has time for half of them"
    for row in measured:
        values = row["values"]
        assert 0 < values["ms"] <= values["p90_ms"] and values["prefill_9"] > 0 < values["prefill_24"]
        assert {"read_us", "plan_us", "submit_and_gpu_us", "prefetch_us", "wait_us", "hit_rate"} <= values.keys()
        assert values["gpu"] <= 1 and values["cpu_and_gpu"] <= values["cpu"]
    first = measured[0]
    assert first["name"] == "all, hybrid" and first["values"]["hit_rate"] == 1 and first["values"]["transfers"] == 0
    by_name = {row["name"]: row["values"] for row in measured}
    if cpu := by_name.get("50%, cpu_only"):
        assert cpu["cpu_experts"] == 2 and cpu["gpu"] == 0
    if gpu := by_name.get("50%, gpu_only"):
        assert gpu["cpu_experts"] == 0 and gpu["cpu"] == 0 and gpu["predicted_us"] > 0


def test_the_report_explains_itself(run: Run) -> None:
    assert "Emulated: there was no card." in run.report and "times mean nothing" in run.report
    for title, text in STEPS.values():
        assert title.format(model="qwen3-30b-a3b") in run.report
        assert text.splitlines()[0] in run.report
    for words in ("## In short", "## The steps", "what to do", "none failed", "| cached, method |"):
        assert words in run.report
    assert "tokens a second of the fastest" not in run.report, "nobody should quote an emulated rate"
    widths = {}
    for line in run.report.splitlines():  # every row of a table has its head's number of cells
        cells = line.replace("\\|", "").count("|")
        assert cells == widths.get("now", cells) or not line, line
        widths = {"now": cells} if cells else {}


def test_it_leaves_no_model_behind(run: Run) -> None:
    assert not list(run.folder.glob("*.gguf"))
    assert not any(name.name.startswith(".") for name in run.folder.iterdir())


# What goes wrong stays where it is.


def plan_in(folder: Path, **changes: Any) -> Plan:
    return Plan(**({"accelerator": "emulated", "models": (), "out": str(folder), "minutes": 1.0} | changes))


def play(
    folder: Path, scripts: dict[str, str], minutes: float = 1.0, most_s: float = 20.0
) -> tuple[Results, list[str]]:
    plan = plan_in(folder, minutes=minutes)
    steps = [Step(name, f"step {name}", 1.0, 0.5, most_s) for name in scripts]
    said: list[str] = []
    command = lambda step, limit_s: [sys.executable, "-c", scripts[step.kind]]  # noqa: E731
    return runner.run_steps(plan, steps, Results.begin(plan), said.append, command), said


def test_a_failing_step_does_not_stop_the_rest(tmp_path: Path) -> None:
    scripts = {
        "tests": "raise RuntimeError('no such kernel')",
        "machine": "from pathlib import Path; from benchmarks.on_gpu.results import Results\n"
        f"Results.read(Path({str(tmp_path)!r})).add('machine', 'machine', 'card', {{'value': 'one'}})",
    }
    results, said = play(tmp_path, scripts)
    assert results.data["steps"]["tests"]["state"] == "failed"
    assert "RuntimeError: no such kernel (exit code 1" in results.data["steps"]["tests"]["note"]
    assert results.data["steps"]["machine"]["state"] == "done" and len(results.rows("machine")) == 1
    assert "no such kernel" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert any("failed" in line for line in said) and any("done" in line for line in said)


def test_an_overrunning_step_is_cut_with_all_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    grandchild = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).write_text('x'); time.sleep(0.05)"
    script = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])\ntime.sleep(60)"
    began = time.monotonic()
    results, _ = play(tmp_path, {"link": script, "kernels": "pass"}, most_s=3.0)
    assert time.monotonic() - began < 30
    assert (
        results.data["steps"]["link"]["state"] == "cut" and "ran past its 3 s" in results.data["steps"]["link"]["note"]
    )
    assert results.data["steps"]["kernels"]["state"] == "done"
    assert "**Did not come off**: step link" in (tmp_path / "report.md").read_text(encoding="utf-8")
    alive.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not alive.exists(), "what the step had started is still running"


def test_what_a_failed_step_had_started_ends_with_it(tmp_path: Path) -> None:
    """It would compete with whatever is measured next."""
    alive = tmp_path / "alive"
    grandchild = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).write_text('x'); time.sleep(0.05)"
    script = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])\nsys.exit('broke off')"
    results, _ = play(tmp_path, {"tests": script})
    assert results.data["steps"]["tests"]["state"] == "failed"
    time.sleep(0.2)
    alive.unlink(missing_ok=True)
    time.sleep(0.5)
    assert not alive.exists()


def test_a_command_that_is_ended_ends_its_step(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "benchmarks.on_gpu", "--accelerator", "emulated", "--quick"]
    running = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and "[1/7]" in running.stdout.readline()
    running.terminate()
    assert running.wait(30) == 128 + signal.SIGTERM
    running.stdout.close()
    assert not [line for line in commands_running() if str(tmp_path) in line]


def commands_running() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(file.read_bytes().decode(errors="replace"))
    return found


def test_a_command_that_is_ended_leaves_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()

    def ended(plan: Plan, steps: Any, results: Results, say: Any) -> Results:
        results.note_step("model:qwen3-30b-a3b", file=str(model))
        raise SystemExit(128 + signal.SIGTERM)

    monkeypatch.setattr(on_gpu, "run_steps", ended)
    with pytest.raises(SystemExit):
        main(["--accelerator", "emulated", "--quick", "--out", str(tmp_path)])
    assert not model.exists()


@pytest.mark.parametrize(
    ("environment_has", "number", "setting"),
    [
        ({}, 1, "CUDA_VISIBLE_DEVICES=1"),
        ({"CUDA_VISIBLE_DEVICES": "3, 5"}, 1, "CUDA_VISIBLE_DEVICES=5"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-ab,MIG-cd"}, 0, "CUDA_VISIBLE_DEVICES=GPU-ab"),
        ({"HIP_VISIBLE_DEVICES": "2,4"}, 1, "HIP_VISIBLE_DEVICES=4"),
    ],
)
def test_every_process_sees_the_one_card_that_was_named(
    monkeypatch: pytest.MonkeyPatch, environment_has: dict[str, str], number: int, setting: str
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment_has.items():
        monkeypatch.setenv(name, value)
    assert visible_card(number) == setting
    name, _, value = setting.partition("=")
    seen = environment(Plan("cuda", card=setting))
    assert seen[name] == value
    monkeypatch.setenv(name, value)  # as a step's own processes get it
    assert environment(Plan("cuda", card=setting))[name] == value


@pytest.mark.parametrize(
    ("said", "code", "state"),
    [
        ("12 skipped in 0.3s", 0, "failed"),
        ("40 deselected in 0.3s", 5, "failed"),
        ("FAILED tests/a.py::b - wrong\n1 failed, 3 passed in 2.0s", 1, "measured"),
        ("3 passed, 12 skipped in 2.0s", 0, "measured"),
    ],
)
def test_tests_that_did_not_run_are_not_taken_for_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, code: int, state: str
) -> None:
    results = Results.begin(plan_in(tmp_path))
    monkeypatch.setattr(correctness, "output_of", lambda *_: (said, code))
    correctness.run(results.plan, results, time.monotonic() + 60)
    assert results.data["rows"][0]["state"] == state
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert ("no result" in report) == (state == "failed")


def test_a_ratio_to_a_hybrid_run_that_failed_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def method(health: Health) -> Any:
        return SimpleNamespace(runtime=SimpleNamespace(health=lambda: health))

    profile = tmp_path / "profile.json"
    profile.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(hybrid, "random_layer", lambda number: number)
    monkeypatch.setattr(hybrid, "calibrated", lambda *_: (profile, 0.0))
    monkeypatch.setattr(hybrid, "compare", lambda *_: {"hybrid": method(BROKEN), "static": method(Health())})
    monkeypatch.setattr(hybrid, "row", lambda name, *_: {"method": name, "token_ms": 12.5, "hybrid_speedup": 3.75})
    results = Results.begin(plan_in(tmp_path, accelerator="cuda"))
    clock.run(results.plan, results, time.monotonic() + 60)
    values = {row["name"]: row["values"] for row in results.data["rows"]}
    assert values["50%, hybrid"] == {} and values["50%, static"] == {"token_ms": 12.5}


def test_a_step_without_time_is_not_begun(tmp_path: Path) -> None:
    results, said = play(tmp_path, {"link": "pass"}, minutes=0.001)
    assert results.data["steps"]["link"]["state"] == "not begun"
    assert "give more --minutes" in said[0]


@pytest.mark.parametrize(("quick", "minutes", "models"), [(True, 2.0, 1), (False, 8.0, 3), (False, 30.0, 3)])
def test_every_model_gets_time_though_the_steps_before_take_all_of_theirs(
    quick: bool, minutes: float, models: int
) -> None:
    plan = Plan("cuda", models=MODELS[:models], quick=quick, minutes=minutes)
    left_s, found = 60 * minutes, {}
    for step in steps_of(plan):
        found[step.name] = step.limit_s(left_s)
        left_s -= 0 if step.kind == "llama" else found[step.name]
    assert all(found[f"model:{model}"] >= 25 for model in plan.models), found
    assert left_s >= 0 and sum(found.values()) > 0.5 * 60 * minutes


BROKEN = Health({"cuda": AcceleratorHealth(failed_steps=3, last_failure="an illegal access")})


def test_an_unclean_row_has_no_time_anywhere(tmp_path: Path) -> None:
    results = Results.begin(plan_in(tmp_path, accelerator="cuda", models=("mixtral-8x7b",)))
    results.add("model:mixtral-8x7b", "methods", "50%, static", {"ms": 17.25, "hit_rate": 0.5}, health=Health())
    results.add("model:mixtral-8x7b", "methods", "50%, hybrid", {"ms": 98.76, "p90_ms": 99.87}, health=BROKEN)
    text, raw = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.md", "results.json"))
    for file in (text, raw):
        assert "17.25" in file and "98.76" not in file and "99.87" not in file
        assert "failed: cuda: 3 failed steps (an illegal access)" in file
    assert "| 50%, hybrid | **failed** | - |" in text and "Not clean, so without times" in text
    assert json.loads(raw)["rows"][1]["health"]["accelerators"]["cuda"]["failed_steps"] == 3


class BrokenMachine:
    """Measures, but on an accelerator that fails meanwhile."""

    health = BROKEN
    sizes = type("Sizes", (), {"prompts": (512, 4096)})

    def restart(self, changes: dict[str, Any], *, eager: bool) -> None:
        assert changes["cache_size"] == "50%" and not eager

    def decode(self) -> dict[str, Any]:
        return {"ms": 1.0}

    overlap = prediction = dict

    def prefill_s(self, num_tokens: int) -> float:
        return 0.125


def test_a_configuration_that_fails_underway_has_no_time(tmp_path: Path) -> None:
    results = Results.begin(plan_in(tmp_path, models=("mixtral-8x7b",)))
    _row(results, "model:mixtral-8x7b", BrokenMachine(), "50%", "hybrid", 100.0)
    (row,) = results.data["rows"]
    assert row["state"] == "unclean" and row["values"] == {}


def test_every_measurement_goes_without_the_fallback() -> None:
    text = (ROOT / "benchmarks/on_gpu/model.py").read_text(encoding="utf-8")
    assert '"fallback": False' in text and set(METHODS) >= {"hybrid", "static", "gpu_only", "cpu_only"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accelerator", "xpu"], "accelerator 'xpu' is not one this can measure"),
        (["--accelerator", "cuda:x"], "accelerator 'cuda:x'"),
        (["--accelerator", "emulated", "--minutes", "0"], "--minutes 0 is no time"),
        (["--accelerator", "emulated", "--llama-bench", "/nowhere"], "--llama-bench /nowhere: there is no such file"),
    ],
)
def test_a_wrong_option_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
@pytest.mark.parametrize("words", [[], ["--accelerator", "cuda"], ["--quick", "--accelerator", "cuda:1"]])
def test_without_a_card_it_says_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "torch finds no CUDA or ROCm card" in printed and "--accelerator emulated" in printed
    assert len(printed.splitlines()) == 1


def test_unknown_options_are_refused() -> None:
    for words in (["--models", "gpt-2"], ["--fast"]):
        with pytest.raises(SystemExit) as refused:
            main(words)
        assert refused.value.code == 2


def test_the_page_in_the_documentation_is_this_one(run: Run) -> None:
    written = PAGE.read_text(encoding="utf-8")
    if "no card has run this program" in written:
        assert written == page(), "python -m benchmarks.on_gpu --accelerator emulated --quick --write-docs"
    assert page(run.data) == page(), "an emulated run is no measurement"
    measured = run.data | {"plan": run.data["plan"] | {"accelerator": "cuda"}}
    assert "No such measurement exists" not in page(measured) and "## In short" in page(measured)
