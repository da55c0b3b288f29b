"""gpt-oss-120b's own layers, two of them: 2880 wide, 128 experts of which a token has 4, MXFP4, 64 heads, a window.

Random weights of the right sizes, 3.4 GB, in llama.cpp's layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.backends.torch_reference import expert_answer
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from tests.kernels.layers import DEVICE, relative_error

from .llama_cpp import LlamaCpp
from .stock import logits_of

pytestmark = pytest.mark.slow

WIDE, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD, VOCAB, LAYERS = 2880, 128, 4, 64, 8, 64, 512, 2
PROMPT = np.random.default_rng(3).integers(0, 256, 200).tolist()  # longer than the window


def written(path: Path) -> Path:
    random = np.random.default_rng(1)
    writer = GGUFWriter(path, "gpt-oss")
    for name, value in {
        "block_count": LAYERS,
        "context_length": 131072,
        "embedding_length": WIDE,
        "feed_forward_length": WIDE,
        "expert_feed_forward_length": WIDE,
        "expert_count": EXPERTS,
        "expert_used_count": TOP_K,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.sliding_window": 128,
        "rope.scaling.original_context_length": 4096,
    }.items():
        writer.add_uint32(f"gpt-oss.{name}", value)
    writer.add_float32("gpt-oss.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("gpt-oss.rope.freq_base", 150000.0)
    writer.add_float32("gpt-oss.rope.scaling.factor", 32.0)
    writer.add_string("gpt-oss.rope.scaling.type", "yarn")
    alphabet = [chr(byte) if 33 <= byte < 127 else f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(alphabet + [f"<unused{number}>" for number in range(VOCAB - 256)])
    writer.add_token_merges(["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", VOCAB - 1)

    def plain(name: str, *shape: int, factor: float = 0.1, offset: float = 0.0) -> None:
        values = offset + factor * random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, values.astype(np.float32))

    def q8(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        writer.add_tensor(name, quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)

    def experts(name: str) -> None:
        blocks = random.integers(0, 256, (EXPERTS, WIDE, WIDE // 32, 17), dtype=np.uint8)
        blocks[..., 0] = random.integers(119, 122, blocks.shape[:3], dtype=np.uint8)
        data = blocks.reshape(EXPERTS, WIDE, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType.MXFP4)
        plain(f"{name}.bias", EXPERTS, WIDE)

    q8("token_embd.weight", VOCAB, WIDE)
    q8("output.weight", VOCAB, WIDE)
    plain("output_norm.weight", WIDE, offset=1.0)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        plain(f"{block}attn_norm.weight", WIDE, offset=1.0)
        plain(f"{block}post_attention_norm.weight", WIDE, offset=1.0)
        plain(f"{block}attn_sinks.weight", HEADS, factor=1.0)
        for role, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            q8(f"{block}attn_{role}.weight", heads * HEAD, WIDE)
            plain(f"{block}attn_{role}.bias", heads * HEAD)
        q8(f"{block}attn_output.weight", WIDE, HEADS * HEAD)
        plain(f"{block}attn_output.bias", WIDE)
        plain(f"{block}ffn_gate_inp.weight", EXPERTS, WIDE, factor=2 * WIDE**-0.5)
        plain(f"{block}ffn_gate_inp.bias", EXPERTS)
        for role in ("gate", "up", "down"):
            experts(f"{block}ffn_{role}_exps")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = written(tmp_path_factory.mktemp("gpt-oss") / "two-layers.gguf")
    yield path
    path.unlink()


def loaded(file: Path, backend: str) -> LoadedModel:
    return load_model(file, option_overrides={"cpu_backend": backend, "accelerator": "none"}, progress=False)


def test_the_cpu_backend_computes_what_the_reference_does(file: Path) -> None:
    """Layer by layer, as a close choice of experts may fall otherwise; ggml rounds activations to 8 bits."""
    reference, ours = loaded(file, "torch_reference").runtime, loaded(file, "auto").runtime
    generator = torch.Generator().manual_seed(5)
    for tokens in (1, 9):
        hidden = torch.randn(tokens, WIDE, generator=generator)
        ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
        routed = Routed(hidden, ids, torch.rand(tokens, TOP_K, generator=generator).softmax(-1))
        for layer in range(LAYERS):
            wanted = reference.finish(reference.begin(layer, routed))
            assert relative_error(ours.finish(ours.begin(layer, routed)), wanted) < 0.02


def test_the_whole_model_is_llama_cpps(file: Path) -> None:
    """Of a prompt beyond the window the likeliest tokens have the same probabilities, up to 8-bit activations."""
    ours = loaded(file, "auto")
    expected = torch.log_softmax(logits_of(ours.model, PROMPT)[-1], dim=-1)
    found = LlamaCpp(file).next_token(PROMPT)
    assert found and all(abs(float(expected[token]) - value) < 0.1 for token, value in found.items())


def test_the_triton_kernels_compute_what_the_reference_does(file: Path) -> None:
    """In the interpreter: a token of four experts, and a prompt, with five experts in slots."""
    pytest.importorskip("triton")
    experts = loaded(file, "auto").runtime.store.layers[0]
    assert TritonGpu.refuses(experts) is None
    held, layout = [3, 17, 64, 90, 127], SlotLayout(experts)
    memory = torch.full((len(held), layout.slot_bytes), 0xFF, dtype=torch.uint8)
    table = torch.full((EXPERTS,), -1, dtype=torch.int32)
    for slot, expert in enumerate(held):
        layout.write(experts.parts(expert), memory[slot])
        table[expert] = slot
    backend = TritonGpu()
    backend.add_layer(experts, layout, memory.to(DEVICE))
    backend.prepare(16)
    generator = torch.Generator().manual_seed(5)
    for tokens, within in ((1, 0.02), (10, 0.005)):
        hidden = torch.randn(tokens, WIDE, generator=generator)
        places = torch.rand(tokens, len(held), generator=generator).topk(TOP_K).indices
        ids, weights = torch.tensor(held)[places], torch.rand(tokens, TOP_K, generator=generator).softmax(-1)
        wanted = torch.zeros(tokens, WIDE)
        for expert in held:
            token, place = torch.where(ids == expert)
            if len(token):
                answer = expert_answer(experts, experts.parts(expert), hidden[token])
                wanted.index_add_(0, token, answer * weights[token, place, None])
        out = torch.zeros(tokens, WIDE, device=DEVICE)
        slots = [(expert, slot) for slot, expert in enumerate(held)]
        backend.launch(0, slots, table.to(DEVICE), Routed(hidden, ids, weights).to(DEVICE), out)
        assert relative_error(out.cpu(), wanted) < within
