"""Experts of every form: what the description says is what stock modules compute, and what every backend computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from hybrimoe_kt.backends.cpu_auto import candidates_for, left_to_torch
from hybrimoe_kt.backends.cpu_ggml import GgmlBackend
from hybrimoe_kt.backends.cpu_llamafile import LlamafileBackend
from hybrimoe_kt.backends.gpu_torch import TorchGpu
from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu, expert_ffn
from hybrimoe_kt.device.backend import GpuBackend, Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import ExpertForm
from tests.kernels.layers import DEVICE, relative_error
from tests.support.random_blocks import Type, random_blocks

PLAIN_GPT_OSS = ExpertForm(alpha=1.702, limit=7.0, up_offset=1.0)
GPT_OSS = replace(PLAIN_GPT_OSS, has_biases=True)
FORMS = {
    "silu, biases": ExpertForm(has_biases=True),
    "gpt-oss": GPT_OSS,
    "gpt-oss without biases": PLAIN_GPT_OSS,
    "limited silu": ExpertForm(limit=0.5),
    "silu limited behind it": ExpertForm(limit=0.5, cuts_activated=True),
    "gelu": ExpertForm("gelu"),
    "tanh gelu": ExpertForm("gelu_tanh"),
    "relu squared without a gate": ExpertForm("relu2", is_gated=False),
    "tanh gelu without a gate, biases": ExpertForm("gelu_tanh", is_gated=False, has_biases=True),
}
PUBLISHED = "gpt-oss", "tanh gelu", "relu squared without a gate"
each_form = pytest.mark.parametrize("name", FORMS)
EXPERTS, TOP_K = 6, 3


def layer(name: str, kind: Type = Type.Q8_0, hidden: int = 352, inter: int = 96) -> LayerExperts:
    form = FORMS[name]
    random = np.random.default_rng(5)

    def matrix(rows: int, columns: int) -> ExpertMatrix:
        raw = 3 * random.standard_normal((EXPERTS * rows, columns), dtype=np.float32) * columns**-0.5
        if kind != Type.F32:
            raw = random_blocks(random, kind, EXPERTS * rows, columns)
        data = torch.from_numpy(np.ascontiguousarray(raw)).view(torch.uint8).reshape(EXPERTS, -1)
        return ExpertMatrix(data, int(kind), rows, columns)

    gate = matrix(inter, hidden) if form.is_gated else None
    up, down = matrix(inter, hidden), matrix(hidden, inter)
    sizes = [m.rows for m in (gate, up, down) if m is not None and form.has_biases]
    values = [torch.from_numpy(random.standard_normal((EXPERTS, size), dtype=np.float32)) for size in sizes]
    biases = tuple(ExpertMatrix(v.view(torch.uint8), 0, 1, v.shape[1]) for v in values)
    return LayerExperts(0, EXPERTS, TOP_K, hidden, inter, gate, up, down, form, biases)


def step(hidden: int, num_tokens: int) -> Routed:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].contiguous()
    ids[0, 1] = -1
    states = torch.randn(num_tokens, hidden, generator=generator)
    return Routed(states, ids, torch.rand(num_tokens, TOP_K, generator=generator))


def reference(experts: LayerExperts, routed: Routed) -> torch.Tensor:
    backend = TorchReferenceCpu()
    backend.add_layer(experts)
    backend.submit(0, routed)
    return backend.wait().sum(dim=1)


def in_slots(backend: GpuBackend, experts: LayerExperts, routed: Routed) -> torch.Tensor:
    """All experts in slots, in reverse; what was not laid out is NaN."""
    layout = SlotLayout(experts)
    memory = torch.full((EXPERTS, layout.slot_bytes), 0xFF, dtype=torch.uint8)
    for expert in range(EXPERTS):
        layout.write(experts.parts(expert), memory[EXPERTS - 1 - expert])
    slots = [(expert, EXPERTS - 1 - expert) for expert in range(EXPERTS)]
    table = torch.tensor([slot for _, slot in slots], dtype=torch.int32, device=DEVICE)
    backend.add_layer(experts, layout, memory.to(DEVICE))
    backend.prepare(len(routed.hidden))
    out = torch.zeros(len(routed.hidden), experts.hidden, device=DEVICE)
    backend.launch(0, slots, table, routed.to(DEVICE), out)
    return out.cpu()


STOCK: dict[str, tuple[str, str, dict[str, Any], ExpertForm]] = {
    "gpt-oss": ("gpt_oss", "GptOssExperts", {"num_local_experts": 2, "intermediate_size": 48}, GPT_OSS),
    "nemotron": (
        "nemotron_h", "NemotronHExperts", {"n_routed_experts": 2, "moe_intermediate_size": 48, "moe_latent_size": None},
        ExpertForm("relu2", is_gated=False),
    ),
    "gemma": (
        "gemma4_text", "Gemma4TextExperts", {"num_experts": 2, "moe_intermediate_size": 48, "top_k_experts": 1},
        ExpertForm("gelu_tanh"),
    ),
    "deepseek": (
        "deepseek_v4", "DeepseekV4Experts",
        {"n_routed_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 48, "swiglu_limit": 0.7},
        ExpertForm(limit=0.7),
    ),
    "step": (
        "step3p5", "Step3p7Experts", {"n_routed_experts": 2, "moe_intermediate_size": 48},
        ExpertForm(limit=0.7, cuts_activated=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_the_reference_computes_what_transformers_does(name: str) -> None:
    """On the same numbers, in every form that a family of Transformers has."""
    model_type, class_name, sizes, form = STOCK[name]
    config = AutoConfig.for_model(model_type, hidden_size=32, **sizes)
    folder = {"step3p5": "step3p7"}.get(model_type, model_type.removesuffix("_text"))
    module = __import__(f"transformers.models.{folder}.modeling_{folder}", fromlist=[class_name])
    generator = torch.Generator().manual_seed(2)
    stock = getattr(module, class_name)(config).float()
    stock.limit = form.limit  # Step's is given its layer's
    for parameter in stock.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(5, 32, generator=generator)
    wanted = stock(x, torch.ones(5, 1, dtype=torch.int64), torch.full((5, 1), 0.5))
    held = {key: value[1] for key, value in stock.named_parameters()}
    gate_up, down = held.get("gate_up_proj", held.get("up_proj")), held["down_proj"]
    biases: tuple[torch.Tensor, ...] = ()
    gate = None
    if name == "gpt-oss":
        gate, up, down = gate_up.T[::2], gate_up.T[1::2], down.T
        both = held["gate_up_proj_bias"]
        biases = both[::2], both[1::2], held["down_proj_bias"]
    else:
        gate, up = gate_up.chunk(2) if form.is_gated else (None, gate_up)
    with torch.no_grad():
        torch.testing.assert_close(0.5 * expert_ffn(x, gate, up, down, biases, form), wanted, rtol=1e-5, atol=1e-5)


@each_form
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_ggml(name: str, num_tokens: int) -> None:
    """GELU comes from a table of half precision there; the rest is float32 arithmetic."""
    experts = layer(name, Type.F32)
    routed, backend = step(experts.hidden, num_tokens), GgmlBackend(1, 64)
    backend.add_layer(experts)
    backend.submit(0, routed)
    wanted = reference(experts, routed)
    assert relative_error(backend.wait(), wanted) < (2e-3 if "gelu" in name else 1e-5)
    directly = backend.compute(0, routed)
    assert directly is not None and relative_error(directly, wanted) < (2e-3 if "gelu" in name else 1e-5)


@each_form
def test_torch_in_slots(name: str) -> None:
    experts = layer(name)
    routed = step(experts.hidden, 7)
    assert relative_error(in_slots(TorchGpu(), experts, routed), reference(experts, routed)) < 1e-5


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in PUBLISHED else [pytest.mark.slow]) for name in FORMS]
)
@pytest.mark.parametrize("num_tokens", [2, 19], ids=["decode", "prefill"])
def test_triton(name: str, num_tokens: int) -> None:
    """Both halves, from slots; activations are rounded to 8 bits, or to half precision in prompts."""
    pytest.importorskip("triton")
    experts = layer(name, Type.MXFP4 if "gpt-oss" in name else Type.Q8_0)
    routed = step(experts.hidden, num_tokens)
    assert TritonGpu.refuses(experts) is None
    found = in_slots(TritonGpu(), experts, routed)
    assert relative_error(found, reference(experts, routed)) < (2e-2 if num_tokens < 9 else 2e-3)


@each_form
def test_llamafile_refuses_with_the_reason(name: str) -> None:
    reason = LlamafileBackend.refuses(layer(name, Type.Q8_0, 256, 256))
    assert reason is not None and FORMS[name].describe() in reason and "--cpu_backend ggml" in reason
    assert candidates_for(layer(name)) == ["ggml"] and left_to_torch(layer(name)) is None


def test_what_ggml_has_no_operation_for_is_left_to_torch() -> None:
    odd = replace(layer("limited silu"), form=ExpertForm(alpha=2.0))
    assert "silu with gain 2" in str(GgmlBackend.refuses(odd)) and left_to_torch(odd) is not None


def test_descriptions_that_cannot_be() -> None:
    for wrong, said in (
        (lambda: ExpertForm("relu3"), "activation 'relu3' are not supported; silu, gelu, gelu_tanh and relu2 are"),  # type: ignore[arg-type]
        (lambda: ExpertForm("gelu", alpha=2.0), "alpha is of silu"),
        (lambda: ExpertForm(is_gated=False, limit=1.0), "without a gate"),
        (lambda: ExpertForm(limit=0.0), "leaves nothing"),
        (lambda: replace(layer("gelu"), gate=None), "have no gate in the file"),
        (lambda: replace(layer("gelu"), biases=layer("gpt-oss").biases), "3 biases of experts, their form has 0"),
        (
            lambda: replace(layer("gpt-oss"), biases=layer("gpt-oss").biases[:2]),
            "2 biases of experts, their form has 3",
        ),
    ):
        with pytest.raises(ModelError, match=said):
            wrong()
