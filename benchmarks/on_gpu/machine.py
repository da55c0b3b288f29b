"""Step 0: what the numbers were measured on."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from .plan import Plan
from .results import Results

__all__ = ["run"]

STEP = "machine"


def run(plan: Plan, results: Results, ends_s: float) -> None:
    """Record card, driver, libraries, processor, memory, commit and date."""
    from hybrimoe_kt.device.inspect_machine import attempt

    probes = {"card": lambda: _card(plan), "software": _software, "host": _host, "code": _code}
    for name, probe in probes.items():
        found = attempt(probe)
        problem = found.pop("problem")
        if problem:
            results.fail(STEP, "machine", name, problem)
        for key, value in found.items():
            results.add(STEP, "machine", key, {"value": str(value)})


def _card(plan: Plan) -> dict[str, Any]:
    if plan.is_emulated:
        return {"card": f"none: {plan.accelerator}, tiny shapes, times mean nothing"}
    import torch

    from hybrimoe_kt.device.choose import choose_accelerator

    device = choose_accelerator(plan.accelerator)
    assert device is not None, "the command line has checked it"
    properties = torch.cuda.get_device_properties(device.device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    found = {"card": f"{device.describe()}, {memory}, {properties.multi_processor_count} multiprocessors"}
    uuid = getattr(properties, "uuid", None)  # nvidia-smi counts cards in an order of its own, hidden ones too
    card = f"GPU-{uuid}" if uuid is not None else "0"
    found["driver"] = _driver(card) or "not told"
    return found | ({"link": link} if (link := _pcie(card)) else {})


def _driver(card: str) -> str:
    if said := _nvidia_smi(card, "driver_version"):
        return f"NVIDIA {said}"
    file = Path("/sys/module/amdgpu/version")
    return f"amdgpu {file.read_text(encoding='ascii').strip()}" if file.is_file() else ""


def _pcie(card: str) -> str:
    """The link's generation and width at most; at rest it may run slower."""
    said = _nvidia_smi(card, "pcie.link.gen.max,pcie.link.width.max").split(",")
    return f"PCIe {said[0].strip()}.0 x{said[1].strip()}" if len(said) == 2 else ""


def _nvidia_smi(card: str, query: str) -> str:
    command = ["nvidia-smi", "-i", card, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


def _software() -> dict[str, Any]:
    import torch

    from hybrimoe_kt.device.inspect_machine import inspect_accelerators, inspect_library

    found = {"torch": f"{torch.__version__}, built for {inspect_accelerators()['torch_built_for']}"}
    libraries = {
        "triton": "triton",
        "transformers": "transformers",
        "libggml-python": "libggml",
        "kt-kernel": "kt_kernel",
    }
    for name, module in libraries.items():
        found[name] = inspect_library(name, module)["version"] or "not installed"
    return found | {"Python": platform.python_version(), "kernel": f"{platform.system()} {platform.release()}"}


def _host() -> dict[str, Any]:
    from hybrimoe_kt.device.cores import default_expert_threads
    from hybrimoe_kt.device.inspect_machine import inspect_cpu, inspect_memory

    cpu, memory = inspect_cpu(), inspect_memory()
    limit = memory["container_limit_bytes"]
    cores = f"{cpu['physical_cores']} cores ({cpu['logical_cores']} threads), {', '.join(cpu['features'])}"
    found = {
        "processor": f"{cpu['model']}, {cores}",
        "threads for experts": default_expert_threads(beside_accelerator=True),
    }
    found["RAM"] = f"{memory['total_bytes'] / 2**30:.0f} GiB, {memory['available_bytes'] / 2**30:.0f} available"
    if limit is not None:
        found["RAM"] += f", this container may use {limit / 2**30:.0f}"
    return found


def _code() -> dict[str, Any]:
    import hybrimoe_kt

    found = {"hybrimoe_kt": hybrimoe_kt.__version__, "commit": _git("rev-parse", "--short=12", "HEAD") or "not in git"}
    if _git("status", "--porcelain", "--untracked-files=no"):
        found["commit"] += ", with changes"
    return found | {"date": time.strftime("%Y-%m-%d %H:%M %Z")}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return re.sub(r"\s+", " ", done.stdout).strip()
