"""HybriMoE for kTransformers: dynamic CPU/GPU scheduling, prefetching and caching of MoE experts.

    from hybrimoe_kt import load

    engine = load()  # the small embedded model; or load("model.gguf")
    print(engine.chat("Hello! How are you today?"))

Importing the package imports neither torch nor Transformers; `load` and `Engine` do.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import ExpertOptions
    from .engine.engine import Engine
    from .engine.events import Answer
    from .engine.sampling import Sampling

__all__ = ["Answer", "Engine", "ExpertOptions", "Sampling", "__version__", "load"]

_HOMES = {
    "Answer": ".engine.events",
    "Engine": ".engine.engine",
    "ExpertOptions": ".config",
    "Sampling": ".engine.sampling",
}

if not (Path(__file__).parent / "kernels").is_dir():  # a checkout, not a wheel: kernels and optimize_rules lie beside
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    path: str | Path | None = None,
    *,
    options: ExpertOptions | None = None,
    rules: str | Path | None = None,
    model_path: str | Path | None = None,
    dtype: str = "auto",
    context_tokens: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    kv_cache_type: str | None = None,
    eager: bool = False,
    parallel: int = 1,
    cache_ram: int | None = None,
    progress: bool = False,
) -> Engine:
    """Load a model and return an engine that answers; takes seconds to minutes.

    `path` is a GGUF file, one file of a split one, a directory of them, or a Hugging Face directory with safetensors;
    None is the small embedded model. `rules` is a rule file or the name of a packaged one, by default the
    architecture's. What `options` has other than its defaults wins over the rule file.

    `model_path` is a directory whose config.json and tokenizer take the place of what the GGUF file says. `dtype` is
    that of the dense weights: float32, bfloat16, float16, or auto, which is float32 on a CPU and bfloat16 on a GPU.
    `context_tokens` limits prompt and answer together, by default the model's own limit. `metadata` takes
    the place of a GGUF file's own, as in {"qwen3moe.expert_used_count": 4}. `kv_cache_type` is how keys and values are
    kept: f16, f32 or q8_0, on a GPU bf16 as well; by default f16 on a CPU and the model's dtype on a GPU. `eager`
    runs the model's own code for every token, where a GPU would replay what it captured. `parallel` answers may be
    begun at once and share steps; `cache_ram` bytes are for conversations that were answered, by default an eighth of
    the machine's memory. `progress` shows bars on standard error.

    Sets torch's number of threads and switches cuDNN's attention off, both for the whole process. Raises ModelError
    for files that cannot be used, ConfigError (RuleError in a rule file) for options, CapacityError for want of memory.
    """
    from .device.cores import let_idle_threads_sleep

    let_idle_threads_sleep()
    from .config import ExpertOptions
    from .engine.build import build_engine
    from .errors import ConfigError
    from .models import embedded_model

    if options is not None and not isinstance(options, ExpertOptions):
        raise ConfigError(f"options are {type(options).__name__}, give ExpertOptions(...) or ExpertOptions.from_kwargs")
    return build_engine(
        embedded_model() if path is None else path,
        model_path=model_path,
        rules_path=rules,
        dtype=dtype,
        context_tokens=context_tokens,
        option_overrides=options.changed() if options is not None else {},
        metadata=metadata,
        kv_cache_type=kv_cache_type,
        eager=eager,
        parallel=parallel,
        cache_ram=cache_ram,
        progress=progress,
    )
