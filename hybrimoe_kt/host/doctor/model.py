"""Which kernels serve a model's experts on a machine, and what memory it takes: data ready for JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hybrimoe_kt.backends.cpu_auto import candidates_for, chosen, in_words, left_to_torch
from hybrimoe_kt.backends.registry import DEFAULT_CPU, DEFAULT_GPU, FALLBACK_GPU, cpu_backend, gpu_backend
from hybrimoe_kt.core.memory_plan import MemoryPlan
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.architectures import architecture_of
from hybrimoe_kt.host.hf.card_plans import Card, Context
from hybrimoe_kt.host.hf.loading import plan_of, unused_of
from hybrimoe_kt.host.hf.sources import experts_of
from hybrimoe_kt.quants import TYPES
from hybrimoe_kt.weights.checkpoint import is_checkpoint
from hybrimoe_kt.weights.expert_layers import expert_layers, is_expert_tensor
from hybrimoe_kt.weights.gguf_file import GgufFile, GgufTensor

__all__ = ["host_expert_bytes", "report_model"]

_ASSUMED = (8, 0)
"""The oldest GPU that the kernels run on, shown where the machine has none."""
_BLOCK = re.compile(r"blk\.(\d+)\.")
_DENSE_BYTES = {"float32": 4, "bfloat16": 2}


def report_model(
    path: Path,
    machine: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    context_tokens: int | None = None,
    card_bytes: int = 0,
) -> dict[str, Any]:
    """Judge a file's header against what `report_machine` found; ModelError for a file that cannot be run at all.

    `changes` are metadata in the place of the file's own. `card_bytes` is the size of a card to plan for, which need
    not be there; 0: what is free on the first.
    """
    if is_checkpoint(path):
        raise ModelError(f"{path}: a checkpoint of safetensors; the doctor reads GGUF files, ktransformers runs both")
    file = GgufFile(path, changes)
    family = architecture_of(file)
    layers, loader = expert_layers(file), experts_of(file)
    outlines = [loader.layer_outline(**layer._asdict()) for layer in layers]
    first = outlines[0]
    report = {
        "file": str(path),
        "name": str(file.metadata.get("general.name", file.path.stem)),
        "architecture": family.gguf,
        "num_files": len(file.files),
        "num_expert_layers": len(layers),
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "hidden": first.hidden,
        "inter": first.inter,
        "kinds": _kinds(outlines, machine),
        "problem": None,
    }
    report |= _unused(path, changes)
    plan = None if report["refusal"] else _plan(path, changes, machine, context_tokens, card_bytes)
    return report | _memory(file, outlines, machine, plan)


def _plan(
    path: Path, changes: Mapping[str, Any] | None, machine: Mapping[str, Any], tokens: int | None, card_bytes: int
) -> MemoryPlan | None:
    """Where the memory of the first accelerator goes, or of an emulated one of the size given; None without either."""
    device = next(iter(machine["accelerators"]["devices"]), None)
    free = None if device is None else device.get("memory_free_bytes")
    if free is None and not card_bytes:
        return None
    gpu = gpu_backend(DEFAULT_GPU if device is None or machine["gpu_kernels"]["runs"] else FALLBACK_GPU)
    name, place = (device["name"], device["name"]) if free is not None and device else ("emulated", "cpu")
    is_free = card_bytes or free or 0  # one that is named need not be here
    card = Card(name, torch.device(place), is_free, gpu, _capability(machine) or _ASSUMED, refuses=False)
    context = Context(tokens, "auto", torch.bfloat16)
    return plan_of(path, changes, card, context, {"card_bytes": card_bytes})


def _unused(path: Path, changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of the file would not be used, and the sentence with which loading it would end, if it would."""
    try:
        return {"unused": [each._asdict() for each in unused_of(path, changes)], "refusal": None}
    except ModelError as error:
        return {"unused": [], "refusal": str(error)}


def _kinds(outlines: list[LayerExperts], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers by what their experts look like, in order of their first layer: who serves each tensor."""
    groups: dict[tuple[Any, ...], list[LayerExperts]] = {}
    for experts in outlines:
        key = tuple((matrix.ggml_type, matrix.rows, matrix.columns) for matrix in experts.tensors.values())
        groups.setdefault((experts.num_experts, key), []).append(experts)
    return [{"layers": [e.layer for e in group], **_kind(group[0], machine)} for group in groups.values()]


def _kind(experts: LayerExperts, machine: Mapping[str, Any]) -> dict[str, Any]:
    cpu_refusal = left_to_torch(experts)
    cpu = in_words(chosen(machine["profile"]["cpu_backends"], candidates_for(experts)))
    devices, capability = machine["accelerators"]["devices"], _capability(machine)
    runs = not devices or machine["gpu_kernels"]["runs"]
    gpu = gpu_backend(DEFAULT_GPU if runs else FALLBACK_GPU)
    gpu_refusal = gpu.refuses(experts)
    rows = gpu.kernels(experts, capability or _ASSUMED)
    tensors = [
        {
            "tensor": row.tensor,
            "type": row.type_name,
            "cpu_kernel": cpu,
            "gpu_decode_kernel": None if gpu_refusal else row.decode,
            "gpu_prefill_kernel": None if gpu_refusal else row.prefill,
        }
        for row in rows
    ]
    return {
        "tensors": tensors,
        "cpu_refusal": cpu_refusal,
        "gpu_refusal": gpu_refusal,
        "gpu_is_assumed": not devices,
    }


def _capability(machine: Mapping[str, Any]) -> tuple[int, int] | str | None:
    """The first device's, as `GpuBackend.kernels` takes it; None without a device of CUDA or HIP."""
    device: Mapping[str, Any] = next(iter(machine["accelerators"]["devices"]), {})
    if device.get("architecture"):
        return str(device["architecture"])
    major, _, minor = (device.get("compute_capability") or "").partition(".")
    return (int(major), int(minor)) if major else None


def _memory(
    file: GgufFile, outlines: list[LayerExperts], machine: Mapping[str, Any], plan: MemoryPlan | None
) -> dict[str, Any]:
    """Bytes wanted, and whether they are there; None where the machine did not say what it has."""
    device = next(iter(machine["accelerators"]["devices"]), None)
    dtype = "float32" if device is None else "bfloat16"
    last = outlines[-1].layer
    dense = [tensor for tensor in file.tensors.values() if _is_dense(tensor, last)]
    expert_bytes = sum(experts.num_experts * experts.expert_bytes for experts in outlines)
    stays_packed = device is None and machine["cpu_kernels"]["keeps_dense_packed"]
    if device is not None and plan is not None:
        dense_bytes, stays_packed = plan.needs.dense_bytes, bool(plan.needs.packed_bytes)
    else:
        dense_bytes = sum(_dense_bytes(tensor, dtype, stays_packed) for tensor in dense)
    host_bytes = sum(host_expert_bytes(experts, transfers=device is not None) for experts in outlines)
    host_bytes += dense_bytes if device is None else 0
    available = machine["memory"].get("available_bytes")
    return {
        "expert_bytes": expert_bytes,
        "dense_file_bytes": sum(tensor.data.nbytes for tensor in dense),
        "dense_bytes": dense_bytes,
        "dense_dtype": "as in the file" if stays_packed else dtype,
        "dense_on": "cpu" if device is None else device["name"],
        "host_bytes": host_bytes,
        "host_available_bytes": available,
        "fits_host": None if available is None else host_bytes <= available,
        "fits_accelerator": None if device is None or plan is None else plan.refusal is None,
        "accelerator_expert_share": None if device is None or plan is None else round(plan.expert_share, 4),
        "plan": None if plan is None else plan.as_dict() | {"rows": plan.rows()},
    }


def _dense_bytes(tensor: GgufTensor, dtype: str, stays_packed: bool) -> int:
    """What a dense tensor takes once loaded, but for the few that a conversion mixes: those are floats anyhow."""
    if stays_packed and len(tensor.shape) > 1 and TYPES[tensor.ggml_type].dtype != "float32":
        return int(tensor.data.nbytes)
    return math.prod(tensor.shape) * _DENSE_BYTES[dtype]


def host_expert_bytes(experts: LayerExperts, *, transfers: bool) -> int:
    """Host memory that a layer's experts want: twice where the CPU reads a padded copy and transfers the file."""
    in_file, copied = experts.num_experts * experts.expert_bytes, cpu_backend(DEFAULT_CPU).copied_bytes(experts)
    return in_file + copied if transfers else copied or in_file


def _is_dense(tensor: GgufTensor, last_layer: int) -> bool:
    """Whether a tensor is loaded as a dense weight; blocks behind the last expert layer guess ahead and are not."""
    match = _BLOCK.match(tensor.name)
    return not is_expert_tensor(tensor.name) and (match is None or int(match[1]) <= last_layer)
