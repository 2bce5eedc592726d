"""Places in other libraries where jitattn computes attention: transformers, and PyTorch's SDPA."""
