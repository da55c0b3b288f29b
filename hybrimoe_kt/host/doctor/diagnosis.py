"""From the facts about a machine and a model to a verdict: what is wrong, how bad, and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hybrimoe_kt.backends.registry import FALLBACK_GPU, REFERENCE
from hybrimoe_kt.sizes import size_text

__all__ = ["Finding", "diagnose"]

_NEEDED = ("torch", "transformers", "gguf")
_KT_KERNEL = "kt-kernel==0.7.2"
_GGML = "libggml-python"


class Finding(NamedTuple):
    """Something to mend; a `blocking` one keeps `ktransformers` with default options from running.

    Or from anything but plain torch on the CPU, which is many times slower.
    """

    text: str
    command: str | None = None
    blocking: bool = False


def diagnose(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return `ready`, `text` (one sentence), `next` (a command) and every finding, the worst first."""
    findings = sorted(_findings(report), key=lambda finding: not finding.blocking)
    ready = not any(finding.blocking for finding in findings)
    if not findings:
        text = f"ready: {_who_computes(report)}"
    else:
        text = f"{'ready, but' if ready else 'not ready:'} {findings[0].text}"
    commands = [finding.command for finding in findings if finding.command]
    return {
        "ready": ready,
        "text": text,
        "next": commands[0] if commands else _run(report),
        "findings": [finding._asdict() for finding in findings],
    }


def _findings(report: Mapping[str, Any]) -> Iterator[Finding]:
    broken = list(_of_libraries(report))
    yield from broken
    if broken:
        return  # whatever else fails may fail because of them
    yield from _of_cpu_kernels(report)
    if report["model"] is not None:
        yield from _of_model(report["model"])
    yield from _of_accelerators(report)
    yield from _of_last_runs(report)
    yield from _of_profile(report)


def _of_libraries(report: Mapping[str, Any]) -> Iterator[Finding]:
    for name in _NEEDED:
        library = report["libraries"][name]
        install = f"pip install {shlex.quote(name + (library['wanted'] or ''))}"
        if library["version"] is None:
            yield Finding(f"{name} is not installed", install, blocking=True)
        elif library["problem"]:
            yield Finding(f"{name} is {library['version']}, {library['problem']}", install, blocking=True)
        elif name == "torch" and report["accelerators"]["torch_built_for"] is None:
            yield Finding(
                f"torch cannot be imported ({report['accelerators']['problem']})",
                install.replace("install", "install --force-reinstall"),
                blocking=True,
            )


def _of_cpu_kernels(report: Mapping[str, Any]) -> Iterator[Finding]:
    """ggml is wanted; kt-kernel is an addition, told of only where it is installed and of no use."""
    kernels, library = report["cpu_kernels"], report["libraries"][_GGML]
    install = f"pip install {shlex.quote(_GGML + (library['wanted'] or ''))}"
    if not kernels["ggml"]["runs"]:
        others = "kt-kernel computes some types of experts" if kernels["kt-kernel"]["runs"] else f"{REFERENCE} is slow"
        if library["version"] is None:
            text = f"ggml, which computes experts and dense weights on the CPU, is missing; {others}"
        else:
            text, install = f"ggml does not run: {kernels['ggml']['problem']}; {others}", f"{install} --force-reinstall"
        yield Finding(text, install, blocking=not kernels["runs"])
    elif library["version"] and library["problem"]:
        yield Finding(f"{_GGML} is {library['version']}, {library['problem']}", install)
    library = report["libraries"]["kt-kernel"]
    if library["version"] is None:
        return
    if not kernels["kt-kernel"]["runs"]:
        yield Finding("kt-kernel is installed but its CPU kernels do not load; nothing else needs it")
    elif library["problem"]:
        yield Finding(f"kt-kernel is {library['version']}, {library['problem']}", _install_kt_kernel())


def _of_model(model: Mapping[str, Any]) -> Iterator[Finding]:
    if model["problem"]:
        yield Finding(f"the model was not judged: {model['problem']}", blocking=True)
        return
    run = f"ktransformers --gguf_path {shlex.quote(model['file'])}"
    if model["refusal"]:
        yield Finding("this file would not load", f"{run} --model_path DIR  # if there is a config.json", blocking=True)
    for kind in model["kinds"]:
        if kind["cpu_refusal"]:
            yield Finding(f"only {REFERENCE} computes these experts, slowly: {kind['cpu_refusal']}", blocking=True)
    if model["fits_accelerator"] is False:
        yield Finding(model["plan"]["refusal"], f"{run} --accelerator none", blocking=True)
    if model["fits_host"] is False:
        needed, there = size_text(model["host_bytes"]), size_text(model["host_available_bytes"])
        if model["dense_on"] == "cpu" and model["dense_bytes"] > model["host_available_bytes"]:
            yield Finding(f"the model takes {needed} of memory and {there} are available", blocking=True)
        else:
            yield Finding(f"the model takes {needed} of memory, {there} are available: the disk will be read again")
    for kind in model["kinds"]:
        if kind["gpu_refusal"] and not kind["gpu_is_assumed"]:
            num = len(kind["layers"])
            yield Finding(f"{num} layer{'s stay' if num > 1 else ' stays'} on the CPU: {kind['gpu_refusal']}")


def _of_accelerators(report: Mapping[str, Any]) -> Iterator[Finding]:
    found = report["accelerators"]
    if found["torch_built_for"] is None:
        return
    if not found["devices"] and found["nvidia_driver"] and found["torch_built_for"] == "CPU":
        yield Finding("an NVIDIA driver is here but torch was built for the CPU only", "pip install '.[cuda]'")
    elif found["problem"]:
        yield Finding(f"torch finds no GPU: {found['problem']}")
    for device in found["devices"]:
        if device["problem"]:
            yield Finding(f"{device['name']} does not answer: {device['problem']}")
    kernels = report["gpu_kernels"]
    if found["devices"] and not kernels["runs"]:
        missing = report["libraries"]["triton"]["version"] is None
        yield Finding(
            f"GPU experts would be computed by {FALLBACK_GPU}, several times slower: {kernels['problem']}",
            "pip install triton" if missing else None,
        )


def _of_last_runs(report: Mapping[str, Any]) -> Iterator[Finding]:
    """The CPU answered, so nobody may have noticed; a later clean run takes the finding away."""
    for name, run in report["last_runs"].items():
        if run["failed_steps"] or (run["given_up"] and not run["shrunk"]):
            happened = f"was given up after {_steps(run)}" if run["given_up"] else f"failed at {_steps(run)}"
            text = f"{name} {happened} in its last run, and the CPU answered"
            text += f": {run['last_failure']}" if run["last_failure"] else ""
            command = f"{_run(report)} --accelerator {shlex.quote(name)} --gpu_backend {FALLBACK_GPU} --verbose"
            yield Finding(text, command)
        else:
            text = f"{name} ran out of memory in its last run; give a smaller --cache_size, or a larger reserve_bytes"
            yield Finding(text)


def _steps(run: Mapping[str, Any]) -> str:
    return f"{run['failed_steps']} layer step{'s' * (run['failed_steps'] != 1)}"


def _of_profile(report: Mapping[str, Any]) -> Iterator[Finding]:
    """Only machines with an accelerator plan with a profile."""
    profile = report["profile"]
    if not report["accelerators"]["devices"]:
        return
    model = f" --model {shlex.quote(report['model']['file'])}" if report["model"] else ""
    if profile["problem"] and profile["path"]:
        yield Finding(f"the calibration cannot be used: {profile['problem']}", f"hybrimoe calibrate{model}")
    elif not profile["measured"] and profile["path"]:
        yield Finding("this machine has not been measured yet", f"hybrimoe calibrate{model}")


def _who_computes(report: Mapping[str, Any]) -> str:
    devices = report["accelerators"]["devices"]
    return f"experts on {devices[0]['name']} and the CPU" if devices else "all experts on the CPU, no accelerator here"


def _run(report: Mapping[str, Any]) -> str:
    model = report["model"]
    return f"ktransformers --gguf_path {shlex.quote(model['file'])}" if model else "ktransformers"


def _install_kt_kernel() -> str:
    return f"pip install --no-deps {_KT_KERNEL}"
