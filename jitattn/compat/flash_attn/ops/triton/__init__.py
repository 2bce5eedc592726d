"""The module path of the original's Triton kernels."""
