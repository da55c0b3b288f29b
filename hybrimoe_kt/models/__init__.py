"""The embedded model, its licence and its provenance."""
