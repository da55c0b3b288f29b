"""HybriMoE for kTransformers: dynamic CPU/GPU scheduling, prefetching and caching of MoE experts."""

from pathlib import Path as _Path

__version__ = "0.1.0"
__all__ = ["__version__"]

if not (_Path(__file__).parent / "kernels").is_dir():  # a checkout, not a wheel: kernels and optimize_rules lie beside
    __path__.append(str(_Path(__file__).parents[1]))
