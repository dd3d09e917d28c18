"""Triton sources, installed as `esper.triton_kernels`. Importing a module of it needs triton."""
