"""Device functions that read GGUF blocks, a file a type; kernels call them through `dispatch`.

Every file has

- `unit`, what a matrix-vector kernel does with 16 bytes of quants: see `dispatch.unit_dots`;
- `tile`, what a matrix-matrix kernel does with a step of 64 columns: see `dispatch.step_tiles`;
- `columns`, which these are, where the type does not take the first 32 for the low tile: see `dispatch.step_columns`;
- `KIND`, GGML's number, as a constant that compiled code can see.
"""
