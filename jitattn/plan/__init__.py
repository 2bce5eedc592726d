"""Launch plans: the kernels of a call, their arguments and workspace, and kernels built ahead."""
