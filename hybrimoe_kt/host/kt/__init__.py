"""The legacy kTransformers framework as the host: what its rule files name in place of its own operators."""
