"""One YAML rule file per model; read with importlib.resources."""
