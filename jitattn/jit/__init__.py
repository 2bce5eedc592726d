"""Turns a kernel spec into a function on a GPU: source, NVRTC, driver, launch."""
