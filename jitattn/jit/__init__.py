"""From a kernel's spec to a function on a GPU: source, NVRTC, driver, launch."""
