"""The place of the original's Triton kernels."""
