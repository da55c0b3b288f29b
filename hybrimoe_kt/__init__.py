"""HybriMoE for kTransformers: dynamic CPU/GPU scheduling, prefetching and caching of MoE experts."""

__version__ = "0.1.0"
__all__ = ["__version__"]
