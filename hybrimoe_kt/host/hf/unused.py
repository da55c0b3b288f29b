"""What a GGUF file holds that nothing here uses: needless, refused because it would change answers, or told.

Metadata that llama.cpp does not read for a family either is told and left at that; what it reads is used or refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.expert_layers import is_expert_tensor, num_layers
from hybrimoe_kt.weights.gguf_file import GgufFile

from .architectures import ARCHITECTURES, Architecture
from .architectures.rotary import ROPE_FACTORS
from .dense_weights import ROWS_FROM, used_tensors
from .sources import Source

__all__ = ["Unused", "unused_in"]


class Unused(NamedTuple):
    """A metadata key or tensor, and why it is not needed; no reason where that is not known."""

    name: str
    reason: str = ""


_SHAPES = "the tensors' shapes say it"
_NEEDLESS = {
    "vocab_size": "the embedding has as many rows",
    "expert_count": _SHAPES,
    "feed_forward_length": _SHAPES,
    "expert_feed_forward_length": _SHAPES,
    "expert_shared_feed_forward_length": _SHAPES,
    "expert_shared_count": _SHAPES,
    "leading_dense_block_count": "which tensors a layer has says it",
    "attention.key_length": _SHAPES,
    "attention.value_length": _SHAPES,
    "rope.dimension_count": "all dimensions of a head are rotated",
    "rope.dimension_sections": "text has one position where pictures have three",
    "rope.scaling.finetuned": "says how the model was trained",
    "attention.head_count_kv": "latent attention has keys for all heads in one",
    "expert_group_used_count": "of groups of experts, see expert_group_count",
    "nextn_predict_layers": "which tensors a layer has says it",
    "token_type_count": "of encoders",
    "embedding_length_out": "the head's tensor has it",
    "tensor_data_layout": "says which program wrote the first checkpoint",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_chunk_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "experts_per_group": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "moe_latent_size": (0,),
    "n_deepstack_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.freq_base_swa": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
"""Keys that change arithmetic where a family reads them -> values with which they do not."""
_ONLY_TOLD = {"pooling_type", "rope.scaling.alpha"} | {key for key in _NEUTRAL if key.startswith("rope.scaling.yarn_")}
"""Of these, what llama.cpp leaves aside in every family here, so that files with other values run there and here."""

_NEEDLESS_TENSORS = {
    re.escape(ROPE_FACTORS): "the configuration says how positions are rotated",
    r"blk\.\d+\.attn_rot_embd\.weight": "a table of rotations, which are computed",
    r"(?:v|mm|a)\..*": "sees pictures or hears; the language model is run",
    r"mtp\..*": "only guesses further tokens",
}
_BLOCK = re.compile(r"blk\.(\d+)\.")


def unused_in(source: Source, parameters: Collection[str], packed: Collection[str] = ()) -> list[Unused]:
    """Return what a GGUF model holds and its `parameters`, experts and configuration do not take up.

    `packed` are tensors that operators read in place.
    ModelError for a tensor that is not known to be needless, and for a key with which the model would be another one.
    A configuration that came from elsewhere makes the file's own needless.
    """
    file = source.file
    if not isinstance(file, GgufFile):
        return []
    used, spare = used_tensors(file, source.architecture, parameters)
    used |= {name.partition(ROWS_FROM)[0] for name in packed}
    if source.rotary is None:
        return unused_tensors(file, used, spare, num_layers(file))
    used.add(ROPE_FACTORS)
    return unused_metadata(file, source.architecture) + unused_tensors(file, used, spare, num_layers(file))


def unused_metadata(file: GgufFile, architecture: Architecture) -> list[Unused]:
    """Return what the metadata says of the model and the configuration does not take up; ModelError for what must be.

    The tokenizer's keys are not looked at, and of the general ones those alone that a user has added.
    """
    read = set(architecture.stated.values())
    head_dim = _head_dim(architecture.config(file, read))
    family = ARCHITECTURES[architecture.gguf]
    family.variant(file, family.key(file, read))
    found = []
    for full in file.metadata:
        prefix, _, name = full.partition(".")
        if full in file.added and prefix not in (architecture.gguf, "tokenizer"):
            found.append(Unused(full))
        if prefix != architecture.gguf or name in read:
            continue
        value = _value(file.metadata[full])
        if name in ("rope.dimension_count", "attention.value_length") and head_dim and value != head_dim:
            raise ModelError(f"{file.path}: {full} is {value!r} with heads of {head_dim}, which is not supported")
        if name in _NEUTRAL and value in _NEUTRAL[name]:
            found.append(Unused(full, "with this value it changes nothing"))
        elif name in _NEUTRAL and name not in _ONLY_TOLD:
            raise ModelError(
                f"{file.path}: {full} is {value!r}, which changes what the model computes and is not supported"
            )
        else:
            found.append(Unused(full, _NEEDLESS.get(name, "")))
    return found


def _value(value: Any) -> Any:
    """One value where all layers have the same."""
    return value[0] if isinstance(value, list) and len({str(each) for each in value}) == 1 else value


def _head_dim(config: dict[str, Any]) -> int | None:
    """How wide heads are where keys and values are alike."""
    if "qk_rope_head_dim" in config:
        return None
    found: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return found


def unused_tensors(file: GgufFile, used: Collection[str], spare: Collection[str], num_layers: int) -> list[Unused]:
    """Return the tensors that are neither in `used` nor experts of `num_layers` layers; ModelError for one not known.

    What is `spare` is there in another form as well.
    A tensor that is left out silently would be another model.
    """
    found = []
    for name in file.tensors:
        block = _BLOCK.match(name)
        if block is not None and int(block[1]) >= num_layers:
            found.append(Unused(name, "only guesses further tokens"))
        elif name in spare and name not in used:
            found.append(Unused(name, "the file has the product of it as well"))
        elif name not in used and not is_expert_tensor(name):
            reason = next((why for pattern, why in _NEEDLESS_TENSORS.items() if re.fullmatch(pattern, name)), None)
            if reason is None:
                raise ModelError(
                    f"{file.path}: tensor {name} is not used by {file.architecture} models here; without it the "
                    f"model would be another one"
                )
            found.append(Unused(name, reason))
    return found
