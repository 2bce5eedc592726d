"""Kernel specs, which determine machine code, and the parameter structs of launches."""
