"""CPU path: attention in differentiable torch operations."""
