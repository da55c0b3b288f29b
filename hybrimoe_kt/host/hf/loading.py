"""Weights in, model out: Transformers builds and loads the model, our rules choose its operators in between.

The hook is a custom quantizer: it sees the model while it is still on the meta device, so that replaced modules
never own weights. Dense weights arrive lazily through `from_pretrained`, which brings tying, buffers kept in
float32, progress bar and load report. Transformers' internals are touched here and in dense_weights only.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from hybrimoe_kt.core.memory_plan import MemoryPlan
from hybrimoe_kt.device.unused_memory import give_back_unused
from hybrimoe_kt.errors import ConfigError, ModelError, first_line
from hybrimoe_kt.host.card_plan import check_kv_widths
from hybrimoe_kt.host.rules import injection as rule_engine
from hybrimoe_kt.kv_cache_types import check_kv_cache_type
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.layer_ggml import GgmlLayer
from hybrimoe_kt.operators.sink_attention import implementation_for
from hybrimoe_kt.operators.stored_layer import StoredLayer
from hybrimoe_kt.operators.stored_state import StoredState
from hybrimoe_kt.runtime import ModelExperts, Runtime, assemble
from hybrimoe_kt.weights.checkpoint_experts import CheckpointLoader
from hybrimoe_kt.weights.file_pages import bring_in
from hybrimoe_kt.weights.gguf_file import GgufFile
from hybrimoe_kt.weights.gguf_loader import GgufLoader

from .architectures import Architecture
from .card_plans import Card, Context, plan_model
from .dense_layers import DenseModel, attach_dense_layers
from .dense_upload import DenseOnAccelerators
from .fixed_steps import kernels_of
from .injector import Injector
from .language_models import language_model
from .look_ahead import look_ahead, note_routers
from .placement import Crossings, Placement
from .sources import Source, open_source
from .unused import Unused, unused_in

__all__ = ["LoadedModel", "load_model", "plan_of", "unused_of"]

logger = logging.getLogger(__name__)

_METHOD = "hybrimoe"


@dataclass
class LoadedModel:
    """A model ready to generate, with what was decided on the way."""

    model: PreTrainedModel
    loader: GgufLoader | CheckpointLoader
    architecture: Architecture
    rules_file: Path
    warnings: list[str]
    placement: Placement
    crossings: Crossings | None
    """Of hidden states between devices, where layers are divided over several."""
    on_accelerators: DenseOnAccelerators
    """Dense weights that lie on accelerators as the file has them."""
    dense: DenseModel | None = None
    """Where every layer's dense piece is a graph."""
    kv_cache_type: str = "auto"
    """How keys and values are kept of layers that have no cache of their own, see `cache_layers`."""
    plans: Mapping[str, MemoryPlan] = field(default_factory=dict)
    """By accelerator, where its memory goes."""
    _runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """What computes the experts."""
        assert self._runtime is not None, "load_model attached one"
        return self._runtime

    @cached_property  # asked for in every step
    def cache_name(self) -> str:
        """What the model calls the cache that it is given: it changed with Transformers 5.24."""
        names = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    def cache_layers(self) -> list[StoredLayer | StoredState | None]:
        """Make, for each layer of a new conversation's cache, what keeps its keys and values; None: Transformers' own.

        A conversation's own, and gone with it.
        """
        body: Any = self.model.model
        return [layer.cache_layer() if isinstance(layer, GgmlLayer) else None for layer in body.layers]

    def dense_seconds(self) -> float:
        """Spent in the graphs of layers' dense pieces since the start."""
        body: Any = self.model.model
        memories = {id(m): m for layer in body.layers if isinstance(layer, GgmlLayer) and (m := layer.memory)}
        return sum(memory.seconds for memory in memories.values())

    def detach(self) -> None:
        """Let go of the runtime, whose memory is free once nobody else holds it; no step until another is attached."""
        self._runtime = None
        for module in self.model.modules():
            if isinstance(module, HybriMoEExperts):
                module.runtime = None

    def attach(self, runtime: Runtime) -> None:
        """Let `runtime`, made of this model's experts, compute them from now on."""
        self._runtime = runtime
        for module in self.model.modules():
            if isinstance(module, HybriMoEExperts):
                module.attach(runtime)
        look_ahead(self.model, runtime, self.architecture, runtime.options.prefetch_depth)


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):
    """Carries the injection step into Transformers' loading; never saved."""

    quant_method: Any  # one of Transformers' own by its annotation

    def __init__(self, inject: Callable[[nn.Module], None] | None = None, checkpoint_type: str = "", **_: Any) -> None:
        self.quant_method = _METHOD
        self.inject = inject
        self.checkpoint_type = checkpoint_type

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    """Replaces modules by operators before any weight is loaded; quantises nothing."""

    requires_calibration = False
    quantization_config: _Config

    def __init__(self, quantization_config: _Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.quantization_config.inject is not None:
            self.quantization_config.inject(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Add what brings the names of the type that the checkpoint is of to the model's, but for whole prefixes."""
        others = get_checkpoint_conversion_mapping(self.quantization_config.checkpoint_type) or []
        within = [each for each in others if not any(name.startswith("^") for name in each.source_patterns)]
        base: Any = super()
        return [*within, *base.update_weight_conversions(weight_conversions, model)]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def load_model(
    gguf_path: str | Path,
    *,
    model_path: str | Path | None = None,
    rules_path: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    option_overrides: dict[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    kv_cache_type: str | None = None,
    context_tokens: int | None = None,
    progress: bool = True,
    assemble: Callable[[ModelExperts], Runtime] = assemble,
) -> LoadedModel:
    """Load a model with its experts under the runtime; raises HybriMoEError subclasses on anything unusable.

    `gguf_path` names a GGUF file, a directory of them, or a Hugging Face directory with safetensors. The
    configuration comes from `model_path` (a directory with config.json) when given, else from the GGUF metadata.
    Without `rules_path`, a file or the name of a packaged one, the architecture's rules apply. `option_overrides` are
    `ExpertOptions` keys that win over the rules. `device` holds the dense weights that no rule places elsewhere: a
    torch device, or an emulated accelerator ("emulated:0"). `metadata` takes the place of the GGUF file's own.
    `kv_cache_type` (see `kv_cache_types`) wins over the rules' for what graphs on the CPU keep, and is what other
    layers keep. `context_tokens` are what an accelerator's memory is planned for, see `core.memory_plan`. `assemble`
    makes the runtime.
    """
    if context_tokens is not None and context_tokens < 1:
        raise ConfigError(f"context_tokens is {context_tokens}, valid: 1 or more")
    context = Context(context_tokens, kv_cache_type or "auto", dtype)
    check_kv_cache_type(context.kv_cache_type)
    source = open_source(gguf_path, model_path, metadata)
    architecture, config, loader = source.architecture, source.config, source.loader
    rules_file = _rules_file(rules_path, architecture)
    named = None if kv_cache_type == "auto" else kv_cache_type
    inject = Injector(rules_file, loader, device, option_overrides or {}, named, family=architecture)
    skeleton = _skeleton(config)
    inject(skeleton)
    if not inject.experts.store.layers:
        raise ModelError(
            f"{rules_file}: no rule gives this model's experts to HybriMoEExperts, so they have no weights"
        )
    parameters = {name: tuple(value.shape) for name, value in _stored(skeleton).items()}
    state = source.state(parameters, dtype, inject.placement.device_of)
    told = _told(source, unused_in(source, parameters, loader.packed))
    for name, reason in loader.dequantised.items():
        if name in parameters:  # else an operator reads what it would be made of
            logger.info("%s stays float, though a rule would have it packed: %s", name, reason)
    kernels = kernels_of(skeleton)
    plans = plan_model(source, inject.experts, inject.placement, parameters, context, attention=kernels)
    with _progress(progress):
        model, unexpected = _build(type(skeleton), config, state, inject, dtype, inject.placement, source, parameters)
    told += _told_of(source, unexpected)
    if source.rotary is not None:
        source.rotary.apply(model)
    if isinstance(source.file, GgufFile):
        architecture.finish(model)
    on_accelerators = DenseOnAccelerators(model)
    on_accelerators.load(dtype, progress=progress)
    give_back_unused({parameter.device for parameter in model.parameters()})  # slots come next, and are large
    placement = inject.placement
    crossings = Crossings(model, placement) if placement.is_split else None
    warnings = inject.warnings + told
    loaded = LoadedModel(model, loader, architecture, rules_file, warnings, placement, crossings, on_accelerators)
    inject.experts.plans = loaded.plans = plans
    loaded.attach(assemble(inject.experts))
    note_routers(model, architecture)
    loaded.dense = attach_dense_layers(model, architecture)  # now that the routers' weights have found their place
    if not all(loaded.cache_layers()):
        check_kv_widths(config, context.kv_cache_type)
        loaded.kv_cache_type = context.kv_cache_type
    source.file.release_pages()
    if isinstance(source.file, GgufFile):
        is_multiplied = "output.weight" not in source.file.tensors  # else the embedding is only looked up, by the row
        unread = on_accelerators.names() | (set() if is_multiplied else {"token_embd.weight"})
        dense = [matrix.data for name, matrix in loader.packed.items() if name not in unread]
        bring_in(loaded.runtime.experts_read_in_place, dense, progress=progress)
    for warning in loaded.warnings:
        logger.warning("%s", warning)
    return loaded


def plan_of(
    gguf_path: str | Path, metadata: Mapping[str, Any] | None, card: Card, context: Context, options: Mapping[str, Any]
) -> MemoryPlan:
    """Return what `load_model` would plan for a GGUF model on one card under its packaged rules, from the header."""
    source = open_source(gguf_path, None, metadata)
    rules_file, skeleton = _rules_file(None, source.architecture), _skeleton(source.config)
    given = {**options, "accelerator": card.name}
    inject = Injector(
        rules_file, source.loader, str(card.device), given, None, family=source.architecture, tries_kernels=False
    )
    inject(skeleton)
    parameters = {name: tuple(value.shape) for name, value in _stored(skeleton).items()}
    cards, kernels = {card.name: card}, kernels_of(skeleton)
    return plan_model(source, inject.experts, inject.placement, parameters, context, cards, attention=kernels)[
        card.name
    ]


def unused_of(gguf_path: str | Path, metadata: Mapping[str, Any] | None = None) -> list[Unused]:
    """Return what a GGUF model holds that `load_model` would not use; ModelError for what it would not take."""
    source = open_source(gguf_path, None, metadata)
    return unused_in(source, list(_stored(_skeleton(source.config))))


def _told(source: Source, unused: list[Unused]) -> list[str]:
    """One sentence on what the file says and nobody here knows a use or a reason for."""
    names = [each.name for each in unused if not each.reason]
    if not names:
        return []
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [f"{source.file.path}: not used here, nor by llama.cpp: {some}; hybrimoe doctor --model lists all"]


def _told_of(source: Source, unexpected: Sequence[str]) -> list[str]:
    """One sentence on what a checkpoint holds and the model has no place for, beyond layers that only guess."""
    numbered, layers = re.compile(r"\.layers\.(\d+)\."), source.config.num_hidden_layers
    ahead = [name for name in unexpected if (found := numbered.search(name)) and int(found[1]) >= layers]
    names = [name for name in unexpected if name not in ahead and not name.endswith("inv_freq")]
    if not names:
        return []
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [f"{source.file.path}: {len(names)} tensors have no place in this model, which may be another one: {some}"]


def _rules_file(path: str | Path | None, architecture: Architecture) -> Path:
    """The rule file that was named, by its path or as a packaged one, or the architecture's own."""
    if path is None:
        return rule_engine.packaged_rules(architecture.rule_file)
    return Path(rule_engine.list_packaged_rules().get(str(path), path))


def _build(
    cls: type[PreTrainedModel],
    config: Any,
    state: Mapping[str, Any],
    inject: Callable[[nn.Module], None],
    dtype: torch.dtype,
    placement: Placement,
    source: Source,
    parameters: Mapping[str, tuple[int, ...]],
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of what it has no place for."""
    different = "the weights and the configuration belong to different models"
    loaded: Any = cls.from_pretrained(  # a pair, with `output_loading_info`
        None,
        config=config,
        state_dict=state,
        # a function, as configurations are copied deeply
        quantization_config=_Config(lambda model: inject(model), source.checkpoint_type),
        dtype=dtype,
        device_map=placement.device_map,
        attn_implementation=source.architecture.attention or implementation_for(cls),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, in one sentence
    )
    model: PreTrainedModel = loaded[0]
    report: Mapping[str, Any] = loaded[1]
    remove_hook_from_submodules(model)  # accelerate's, where devices differ: `Crossings` moves each tensor once
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{source.file.path}: no tensor for {missing[0]}; {different}")
    if mismatched := sorted(report["mismatched_keys"]) or _mismatched(model, parameters):
        name, found, wanted = mismatched[0]
        raise ModelError(f"{source.file.path}: {name} is {list(found)}, expected {list(wanted)}; {different}")
    return model, sorted(report["unexpected_keys"])


def _mismatched(model: nn.Module, parameters: Mapping[str, tuple[int, ...]]) -> list[tuple[str, Any, Any]]:
    """What up to 5.22 is loaded in any shape: under a quantizer Transformers does not look."""
    found = {name: tuple(value.shape) for name, value in _stored(model).items()}
    return sorted((name, found[name], shape) for name, shape in parameters.items() if found.get(name, shape) != shape)


def _skeleton(config: Any) -> PreTrainedModel:
    """The model without weights, built once to learn its parameters and to fail before anything is loaded."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = language_model(config)
            return model
    except Exception as error:  # whatever Transformers or torch make of dimensions that cannot be
        raise ModelError(
            f"no {config.model_type} model can be built from this configuration: {first_line(error)}"
        ) from None


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers that a file must provide: tied ones only once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: value for name, value in model.state_dict().items() if name not in tied}


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[None]:
    """Show or hide Transformers' loading bar, leaving its setting as it was."""
    before = transformers_logging.is_progress_bar_enabled()
    _show_bars(shown)
    try:
        yield
    finally:
        _show_bars(before)


def _show_bars(shown: bool) -> None:
    if shown:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
