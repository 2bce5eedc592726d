"""The path of CPU tensors: the same results, differentiable, in torch operations."""
