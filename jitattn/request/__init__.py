"""Validates calls, each kind once: problem, sizes, and kernel arguments."""
