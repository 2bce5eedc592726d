"""The front door of fast-ops: fused attention with biases, causal masks and nested tensors."""
