"""Exception classes.

::

    JitAttnError
    ├── InvalidInputError (ValueError)          an argument breaks a rule; nothing was launched
    ├── UnsupportedError (NotImplementedError)  legal, but no kernel for it exists
    ├── CompileError                            NVRTC refused the generated source, or is missing
    ├── CacheError
    │   └── CacheMissError                      a kernel is not cached and may not be compiled
    ├── LaunchError                             the driver refused to load or launch a kernel
    ├── CommunicationError                      another rank has gone, or does not answer
    └── InternalError                           a broken invariant of ours; please report it

Every message has three parts: the argument and its value, the rule, the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from jitattn.spec.kernel_spec import KernelSpec


class JitAttnError(Exception):
    """Base of all exceptions that jitattn raises on purpose."""


class InvalidInputError(JitAttnError, ValueError):
    """An argument breaks a rule; raised before anything is built or launched."""


class WithoutMemoryError(InvalidInputError):
    """A tensor has a shape and a dtype but no values; callers that need only shapes catch this."""

    def __init__(
        self, message: str = "a tensor has no memory here: it is a meta or a fake one, say"
    ) -> None:
        super().__init__(message)


class StridesError(InvalidInputError):
    """Columns of a tensor are apart; `attention` catches this, and copies q, k or v."""


class NestedError(InvalidInputError):
    """A tensor is nested where a strided one is needed; `attention` catches this."""


class UnsupportedError(JitAttnError, NotImplementedError):
    """The request is legal, but no kernel for it exists (yet, or on this GPU)."""


class CompileError(JitAttnError):
    """NVRTC is missing or rejected the generated source.

    Attributes
    ----------
    spec : KernelSpec or None
        Spec of the kernel; None if the compiler itself could not be used.
    options : tuple of str
        The exact options that NVRTC was given.
    log : str
        The whole compiler log.
    source_dir : Path or None
        Directory that keeps the sources for inspection.
    """

    def __init__(
        self,
        message: str,
        *,
        spec: KernelSpec | None = None,
        options: tuple[str, ...] = (),
        log: str = "",
        source_dir: Path | None = None,
    ) -> None:
        super().__init__(message)
        self.spec = spec
        self.options = options
        self.log = log
        self.source_dir = source_dir


class CacheError(JitAttnError):
    """An explicit cache command failed."""


class CacheMissError(CacheError):
    """A kernel is not cached, and compiling it was forbidden."""


class LaunchError(JitAttnError):
    """The driver refused to load or launch a kernel."""


class CommunicationError(JitAttnError):
    """A rank of a context-parallel call has ended, or did not answer within the timeout."""


class InternalError(JitAttnError):
    """An invariant of jitattn is broken. Please report it with the message."""


#: Messages about unsupported derivatives.
NO_FORWARD_MODE: Final = (
    "forward-mode derivatives (jvp, jacfwd, hessian, dual numbers) are not computed on a GPU; move "
    "the tensors to the CPU, whose path has them, or use reverse mode (grad, vjp, jacrev)"
)
NO_SECOND_ORDER: Final = (
    "a gradient of a gradient was asked for: the GPU path has first derivatives only; "
    "move the tensors to the CPU, whose path has every order"
)
