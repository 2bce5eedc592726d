"""A kernel family each: its tiles, and the kernels that prepare its operands."""
