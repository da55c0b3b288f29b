"""Expert arithmetic, one module a library."""
