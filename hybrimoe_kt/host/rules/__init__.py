"""Rule files: their grammar, the classes they name, and what they replace in a model."""
