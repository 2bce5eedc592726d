"""The front door of xformers 0.0.35: `xformers.ops.memory_efficient_attention` and its relatives.

What differs, on purpose: every GPU from sm_80 on and CPU tensors are taken; gradients of biases, of
5-D inputs and through `memory_efficient_attention_partial` and `merge_attentions` work; `op` has no
effect; lengths may be changed in place in a captured graph. What of xformers is no attention is not
here.
"""

from __future__ import annotations

from jitattn.compat.xformers.version import __version__

#: Whether kernels can be run: programs ask before they use them.
_has_cpp_library = True

__all__ = ["__version__"]
