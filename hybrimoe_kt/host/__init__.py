"""The frameworks that own the model around our operators."""
