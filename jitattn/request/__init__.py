"""One call, checked once: its problem, its sizes, and what kernels read of it."""
