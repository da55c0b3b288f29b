"""GPU kernels, one operation a folder, each beside its naive reference."""

if __name__ == "kernels":
    raise ImportError("import hybrimoe_kt.kernels, not kernels: a different package has that name")
