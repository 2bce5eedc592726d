"""Executes calls: outputs, workspace, launches, autograd functions, torch operators."""
