"""What a family's entry can say, and how a file's metadata becomes a configuration with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.tensor_mapping import TensorNameMap
from torch import nn

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.expert_form import Activation, ExpertForm
from hybrimoe_kt.weights.checkpoint import ExpertNames
from hybrimoe_kt.weights.expert_layers import num_layers
from hybrimoe_kt.weights.gguf_file import GgufFile

from .rotary import Rotary, rotary_of

__all__ = [
    "ONE_EACH",
    "STACKED",
    "W1_W3_W2",
    "Architecture",
    "Composed",
    "Key",
    "LayerKind",
    "Moves",
    "Transform",
    "gated_form",
]

Moves = Literal["rows", "columns"]
Key = Callable[..., Any]
"""Reads one metadata value: `key(name, default)`, the name without the architecture prefix.

`of_each_layer=True` gives a list of them, whether the file has one or as many as layers.
"""


@dataclass(frozen=True, slots=True)
class Composed:
    """A parameter assembled from several GGUF tensors (each given dequantised) where its own is absent."""

    parts: tuple[str, ...]
    """GGUF names, `{layer}` standing for the block number."""
    build: Callable[..., torch.Tensor]
    """From the parts, in order, and the reader of the metadata."""
    shape: Callable[..., tuple[int, ...]]
    """Result shape from the parts' shapes and the reader, to check a file before anything is dequantised."""
    moves: Moves | None = None
    """As of `Transform`; of the parts one above the other."""


@dataclass(frozen=True, slots=True)
class Transform:
    """A parameter that its own GGUF tensor holds in another arrangement."""

    build: Callable[[torch.Tensor, Key], torch.Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
    """Result shape from the tensor's."""
    moves: Moves | None = None
    """What of a matrix is put in another order, if it is done to nothing else: blocks then stay as they are."""


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")


def gated_form(config: Any, layer: int = 0, *, is_gated: bool = True) -> ExpertForm:
    """Experts with the activation that the configuration names, and nothing else; ModelError for an unknown one."""
    named = next((name for key in _ACTIVATION_KEYS if (name := getattr(config, key, None)) is not None), "silu")
    if named not in _ACTIVATIONS:
        raise ModelError(f"experts with activation {named!r} are not supported; {', '.join(_ACTIVATIONS)} are")
    return ExpertForm(_ACTIVATIONS[named], is_gated=is_gated)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a class of decoder layers does that its modules do not tell."""

    is_paired: bool = False
    """Whether neighbouring dimensions are rotated together; else the halves."""
    is_gated: bool = False
    """Whether queries come with gates on the answers."""
    takes_models_window: bool = False
    """Whether attention asks the configuration for its window."""
    turns_in_windows_only: bool = False
    """Whether layers that look at everything rotate nothing, in a model that has others."""


ONE_EACH = ExpertNames.like("mlp.experts.{expert}.{matrix}.weight")
W1_W3_W2 = ExpertNames.like("block_sparse_moe.experts.{expert}.{matrix}.weight", "w1", "w3", "w2")
STACKED = ExpertNames("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model family: `keys` maps configuration key -> GGUF key (without the architecture prefix)."""

    gguf: str
    model_type: str
    keys: Mapping[str, str]
    alias: str = ""
    """Our name, where `gguf` is another family's as well."""
    other_types: tuple[str, ...] = ()
    """What config.json files call the model type besides, where the model is Transformers' `model_type`."""
    restated: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """A config.json of one of these types in the words of `model_type`."""
    skeleton: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of a small model, to see what rules do: a released model's layer count, the smallest widths.

    Rules see paths and classes only, so widths do not matter and layer counts do.
    """
    rules: str = ""
    """Packaged rule file, where it has not the family's name; a family without a file is served by the default one."""
    checkpoint_names: tuple[ExpertNames, ...] = (ONE_EACH, STACKED)
    """What a checkpoint may call a layer's experts, tried in this order."""
    checkpoint_type: str = ""
    """The model type whose names its checkpoints have, where it is not `model_type`: that of a model which also sees.

    What such names begin with is not looked at.
    """
    pre_tokenizers: tuple[str, ...] = ()
    """What `tokenizer.ggml.pre` says in its files; of a file without it the first, or that of its size, is guessed."""
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values of `tokenizer.ggml.pre` that no other family has -> the patterns of a `TextSplit`."""
    answer_format: str = ""
    """Notation of its models' tool calls (`engine.call_notations`), for chat templates that do not show one."""
    tensor_table: str = ""
    """Whose table of tensor names holds in gguf-py, where it has none under `gguf`."""
    optional_keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    told_by_tensors: Mapping[str, Callable[[GgufFile], Any]] = field(default_factory=dict)
    """Configuration values that no key holds; what is None is left out."""
    present: Mapping[str, str] = field(default_factory=dict)
    """Configuration switches that no key holds -> the tensor whose presence in the file means true."""
    derive: Callable[[Key], Mapping[str, Any]] = lambda key: {}
    """Configuration entries that one key cannot give."""
    composed: Mapping[str, Composed] = field(default_factory=dict)
    """Ending of a parameter's name -> how to assemble it."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Ending of a parameter's name -> GGUF name, where gguf-py's table has none; `{layer}` as above."""
    variant: Callable[[GgufFile, Key], Any] = lambda file, key: None
    """What a file says that may choose another entry from `variants`."""
    variants: Mapping[Any, Architecture] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    """Endings of the parameters that stay float32 whatever the model's dtype."""
    has_rotary_kinds: bool = False
    """Whether layers with windows have rotary positions of their own in its configuration."""
    own_rotary_kinds: tuple[str, ...] = ()
    """What its configuration calls the kinds of rotary positions, where these are not the kinds of layers."""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    """Ending of a parameter's name -> how to rearrange its tensor."""
    stated: Mapping[str, str] = field(default_factory=dict)
    """Ending of the name of a buffer of whole numbers -> the GGUF key that lists them."""
    zero: tuple[str, ...] = ()
    """Endings of the parameters that are zero where the file has no tensor for them."""
    finish: Callable[[nn.Module], None] = lambda model: None
    """What is set right in a built model, where Transformers and llama.cpp read the family differently."""
    layers: Mapping[str, LayerKind] = field(default_factory=dict)
    """Transformers' classes of decoder layers that a graph on the CPU does; the others stay modules."""
    shared_experts: Mapping[str, str] = field(default_factory=dict)
    """Classes of MoE blocks that are the sum of routed and shared experts -> what they call the shared ones."""
    router_inputs: tuple[str, ...] = ()
    """What the MoE block hands its router beside the hidden states: names of the block's own buffers."""
    routes_texts: bool = False
    """Whether its router takes hidden states `[batch, tokens, hidden]` alone."""
    expert_norm: str = "post_attention_layernorm"
    """What layers call the norm in front of their experts."""
    router_normalises: bool = False
    """Whether its router takes the residual stream, and has a norm of its own."""
    router_gives_probabilities: bool = False
    """Whether it returns the softmax of its logits in their place."""
    norm_offset: float = 0.0
    """Added to a norm's weight before it multiplies."""
    attention: str = ""
    """What Transformers is told attends, where neither torch's fused kernels nor `sink_attention` can."""
    layers_take_ids: bool = False
    """Whether layers are given the tokens' ids beside their hidden states."""
    rounds_yarn: bool = True
    """Whether the range in which YaRN blends frequencies is rounded to whole ones."""
    expert_form: Callable[[Any, int], ExpertForm] = gated_form
    """What a layer's experts compute between their matrices, by Transformers' configuration and the layer's number."""

    published_config: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    """What published config.json files say beside what Transformers writes of its configuration; engines read it."""

    @property
    def name(self) -> str:
        """What this program calls the family."""
        return self.alias or self.gguf

    @property
    def rule_file(self) -> str:
        """Name of the packaged rule file that applies when none is given."""
        return self.rules or self.name

    def config(self, file: GgufFile, read: set[str] | None = None) -> dict[str, Any]:
        """Return the Transformers configuration that the file's metadata describes; `read` gets the keys it took."""
        key = self.key(file, read)
        stated = f"{self.gguf}.block_count" in file.metadata
        missing = ([] if stated else ["block_count"]) + [name for name in self.keys.values() if key(name) is None]
        if missing:
            raise ModelError(
                f"{file.path}: metadata key {self.gguf}.{missing[0]} is missing; give --model_path instead"
            )
        self._check_rotated(file)
        config = {ours: key(theirs) for ours, theirs in self.keys.items()}
        config |= {ours: key(theirs) for ours, theirs in self.optional_keys.items() if key(theirs) is not None}
        config |= {ours: name in file.tensors for ours, name in self.present.items()}
        told = {ours: tell(file) for ours, tell in self.told_by_tensors.items()}
        config |= {ours: value for ours, value in told.items() if value is not None}
        config |= dict(self.constants) | dict(self.derive(key))
        config |= {ours: value for ours, value in _common(file, key).items() if value is not None or ours not in config}
        plain, rotary = config.get("rope_parameters") or {}, self.rotary(file, read)
        kinds = self.rotary_kinds(config)
        config["rope_parameters"] = {
            kind: rotary.of(kind).parameters | plain.get(kind, {}) for kind in kinds
        } or rotary.parameters
        return config | {"model_type": self.model_type}

    def rotary_kinds(self, config: Mapping[str, Any]) -> list[str]:
        """The kinds that the configuration names with positions of their own."""
        if self.own_rotary_kinds:
            return list(self.own_rotary_kinds)
        return sorted(set(config["layer_types"])) if self.has_rotary_kinds else []

    def _check_rotated(self, file: GgufFile) -> None:
        key = self.key(file)
        rotated, width = key("rope.dimension_count"), key("attention.key_length_mla") or key("attention.key_length")
        if rotated is not None and not 0 < rotated <= width:
            raise ModelError(f"{file.path}: {rotated!r} dimensions of heads of {width} cannot be rotated")

    def rotary(self, file: GgufFile, read: set[str] | None = None) -> Rotary:
        """Return how the file has positions rotated."""
        is_latent = "kv_lora_rank" in self.keys
        return rotary_of(file, self.key(file, read), is_latent=is_latent, rounds=self.rounds_yarn)

    def key(self, file: GgufFile, read: set[str] | None = None) -> Key:
        """Return the reader of this family's metadata in `file`; it adds the names it is asked for to `read`.

        "block_count" is of the layers that are run. What most files leave out is filled in, and a value for each layer
        is one where all layers have the same; ModelError where they have not.
        """

        def value_of(name: str, default: Any = None, *, of_each_layer: bool = False) -> Any:
            if read is not None:
                read.add(name)
            value = file.metadata.get(f"{self.gguf}.{name}")
            if name == "block_count" and value is not None:
                return num_layers(file)
            if name == "expert_gating_func" and value == 0:
                value = None  # how a converter says that it does not know
            if value is None and default is None and name in _LEFT_OUT:
                return _LEFT_OUT[name](file, value_of)
            if of_each_layer and value is not None:
                return value if isinstance(value, list) else [value] * num_layers(file)
            return default if value is None else _one(file, f"{self.gguf}.{name}", value)

        return value_of

    def name_map(self, num_blocks: int) -> TensorNameMap:
        """gguf-py's table of parameter name -> GGUF name for this family."""
        table = self.tensor_table or self.gguf
        arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == table), None)
        if arch is None:
            raise ModelError(f"{self.gguf}: gguf-py has no tensor names of {table!r}; tensor_table names another")
        return get_tensor_name_map(arch, num_blocks)


_OF_EACH_LAYER = ("attention.recurrent_layers", "attention.sliding_window_pattern", "attention.indexer.types")
"""Keys that differ from layer to layer by their meaning."""


def _one(file: GgufFile, name: str, value: Any) -> Any:
    """A value that may be given for each layer; layers with linear attention have 0 heads for keys."""
    if not isinstance(value, list) or name.endswith(_OF_EACH_LAYER):
        return value
    different = sorted(set(value) - ({0} if name.endswith("head_count_kv") else set()))
    if len(different) != 1:
        raise ModelError(f"{file.path}: {name} differs from layer to layer ({value[:8]}), which is not supported")
    return different[0]


def _width_of(role: str) -> Callable[[GgufFile, Key], int | None]:
    """How wide what ends in this tensor is, by the tensor of the first layer that has it."""

    def width(file: GgufFile, key: Key) -> int | None:
        found = (tensor.shape[-1] for name, tensor in file.tensors.items() if name.endswith(f".{role}.weight"))
        return next(found, None)

    return width


def _head_width(file: GgufFile, key: Key) -> int | None:
    hidden, heads = key("embedding_length"), key("attention.head_count")
    return hidden // heads if hidden and heads else None


_LEFT_OUT: dict[str, Callable[[GgufFile, Key], Any]] = {
    "attention.head_count_kv": lambda file, key: key("attention.head_count"),
    "attention.key_length": _head_width,
    "expert_feed_forward_length": _width_of("ffn_down_exps"),
    "expert_shared_feed_forward_length": _width_of("ffn_down_shexp"),
}
"""What a file need not say -> where it follows from."""


def _common(file: GgufFile, key: Key) -> dict[str, Any]:
    token = "tokenizer.ggml.{}_token_id".format
    ends = {file.metadata.get(token("eos")), file.metadata.get(token("eot"))} - {None}
    return {
        "vocab_size": file.tensor("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "num_hidden_layers": key("block_count"),
        "bos_token_id": file.metadata.get(token("bos")),
        "eos_token_id": sorted(ends) if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": file.metadata.get(token("padding")),
    }
