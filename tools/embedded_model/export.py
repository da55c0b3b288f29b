"""Writes a checkpoint as GGUF: experts Q4_K, other matrices Q8_0, routers and norms F32.

    python -m tools.embedded_model.export --checkpoint .cache/train/last.pt --tokenizer .cache/corpus/tokenizer.json \\
        --name "small-talk" --out hybrimoe_kt/models/small-talk-q4_k.gguf
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from .data import SPECIAL_TOKENS
from .model import Model
from .q4_k import quantize as quantize_q4_k
from .shared_state import load_model

ARCHITECTURE = "qwen3moe"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DESCRIPTION = (
    "A small mixture of experts trained from scratch for chatting in simple English; see the package's model card."
)


def tensors(model: Model) -> Iterator[tuple[str, npt.NDArray[np.float32], Type]]:
    """GGUF names, values and types of all weights."""
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    s = model.shape
    width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    yield "token_embd.weight", weights["embedding.weight"], Type.Q8_0
    yield "output_norm.weight", weights["norm.weight"], Type.F32
    for layer in range(s.num_layers):
        mine = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{layer}.")}
        q, k, v = np.split(mine["attention.qkv.weight"], (width, width + kv_width))
        gate, up = mine["moe.gate_up"][:, : s.expert_size], mine["moe.gate_up"][:, s.expert_size :]
        for name, value, kind in (
            ("attn_norm", mine["attention_norm.weight"], Type.F32),
            ("ffn_norm", mine["moe_norm.weight"], Type.F32),
            ("attn_q", q, Type.Q8_0),
            ("attn_k", k, Type.Q8_0),
            ("attn_v", v, Type.Q8_0),
            ("attn_output", mine["attention.out.weight"], Type.Q8_0),
            ("attn_q_norm", mine["attention.q_norm.weight"], Type.F32),
            ("attn_k_norm", mine["attention.k_norm.weight"], Type.F32),
            ("ffn_gate_inp", mine["moe.router.weight"], Type.F32),
            ("ffn_gate_exps", gate, Type.Q4_K),
            ("ffn_up_exps", up, Type.Q4_K),
            ("ffn_down_exps", mine["moe.down"], Type.Q4_K),
        ):
            yield f"blk.{layer}.{name}.weight", np.ascontiguousarray(value), kind


def quantized(values: npt.NDArray[np.float32], kind: Type) -> npt.NDArray[np.generic]:
    """``values`` in the file's form: bytes for quantised types."""
    if kind == Type.Q4_K:
        return quantize_q4_k(values)
    return values.astype(np.float32) if kind == Type.F32 else gguf.quants.quantize(values, kind)


def write(model: Model, tokenizer: Path, name: str, out: Path, *, full_precision: bool = False) -> None:
    """Write the file with everything a host needs: sizes, tokenizer, template, licence."""
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    _describe(writer, model, name)
    _add_tokenizer(writer, json.loads(tokenizer.read_text())["model"])
    for tensor, values, kind in tensors(model):
        kind = Type.F32 if full_precision else kind
        writer.add_tensor(tensor, quantized(values, kind), raw_dtype=None if kind == Type.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, model: Model, name: str) -> None:
    s = model.shape
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation", "mixture-of-experts"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_S)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(s.context)
    writer.add_embedding_length(s.hidden_size)
    writer.add_block_count(s.num_layers)
    writer.add_feed_forward_length(s.expert_size * s.top_k)
    writer.add_head_count(s.num_heads)
    writer.add_head_count_kv(s.num_kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_rope_freq_base(s.rope_theta)
    writer.add_layer_norm_rms_eps(s.rms_eps)
    writer.add_expert_count(s.num_experts)
    writer.add_expert_used_count(s.top_k)
    writer.add_expert_feed_forward_length(s.expert_size)
    writer.add_vocab_size(s.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, bpe: dict) -> None:
    tokens = [token for token, _ in sorted(bpe["vocab"].items(), key=lambda item: item[1])]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(SPECIAL_TOKENS.index("<|endoftext|>"))
    writer.add_eos_token_id(SPECIAL_TOKENS.index("<|end|>"))
    writer.add_eot_token_id(SPECIAL_TOKENS.index("<|end|>"))
    writer.add_pad_token_id(SPECIAL_TOKENS.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="small-talk")
    parser.add_argument(
        "--f32", action="store_true", help="nothing quantised: what the quantised file is compared with"
    )
    arguments = parser.parse_args()
    write(
        load_model(arguments.checkpoint),
        arguments.tokenizer,
        arguments.name,
        arguments.out,
        full_precision=arguments.f32,
    )
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
