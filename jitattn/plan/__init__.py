"""Which kernels serve a call, and which of them are made ahead."""
