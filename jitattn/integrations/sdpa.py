"""jitattn under `torch.nn.functional.scaled_dot_product_attention`, for torch 2.11 or newer.

    import jitattn.integrations.sdpa

    with jitattn.integrations.sdpa.activated():
        model(x)  # untouched

Torch chooses a backend for a call first (`torch.nn.attention.sdpa_kernel`); ours then takes the
calls of two of them, forward and backward: of the flash backend, through torch's own registry (this
serves `torch.nn.attention.varlen.varlen_attn` too), and of the memory-efficient one, to which calls
with a mask or in fp32 go. Calls of the math and cuDNN backends stay torch's: for ours for sure, use
``sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])``. What ours does not
take is handed on to the kernel that torch has, with one warning, and counted (`counts`).

Neither activate nor restore between the forward and backward pass of a call with dropout: each side
draws its own random bits.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.errors import UnsupportedError
from jitattn.integrations import _sdpa_efficient, _sdpa_flash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NAME: Final = "JITATTN"
_HELP: Final = (
    "jitattn.integrations.sdpa needs torch 2.11 or newer, which has a registry of flash attention "
    "implementations; with this one, call jitattn.attention, or use jitattn.compat.flash_attn"
)
_SLOTS: Final = ("jitattn", "torch", "jitattn_backward", "torch_backward")

_lock: Final = threading.RLock()
_calls: Final = dict.fromkeys(_SLOTS, 0)


class _Handed(threading.local):
    """Whether this thread is inside one of torch's kernels, whose inner calls stay torch's."""

    on: bool = False


_handed: Final = _Handed()


class _State:
    """Who keeps ours active, and what was there before."""

    is_on = False
    contexts = 0
    before: str | None = None


def activate() -> None:
    """Put jitattn under SDPA for this process, until `restore`. A second call does nothing.

    Without a CUDA device nothing changes.

    Raises
    ------
    UnsupportedError
        torch is older than 2.11.
    """
    with _lock:
        _install_first()
        _State.is_on = True


def restore() -> None:
    """Give torch's slots back to what had them before `activate`; without it, do nothing."""
    with _lock:
        was_active = _is_active()
        _State.is_on = False
        if was_active and not _is_active():
            _uninstall()


@contextlib.contextmanager
def activated() -> Iterator[None]:
    """Put jitattn under SDPA inside a ``with`` block, which may be nested.

    The outermost one restores the implementation that was there before, also after an exception.

    Raises
    ------
    UnsupportedError
        torch is older than 2.11.
    """
    with _lock:
        _install_first()
        _State.contexts += 1
    try:
        yield
    finally:
        with _lock:
            _State.contexts -= 1
            if not _is_active():
                _uninstall()


def counts(reset: bool = False) -> dict[str, int]:
    """Return how many calls reached the slots since ours was activated.

    Parameters
    ----------
    reset : bool
        Begin at 0 afterwards.

    Returns
    -------
    dict
        "jitattn", "torch": forward calls that ours served, and that it handed on to torch's
        kernels; "jitattn_backward", "torch_backward": backward calls.
    """
    with _lock:
        found = dict(_calls)
        if reset:
            _calls.update(dict.fromkeys(_SLOTS, 0))
        return found


def _check_torch() -> None:
    from torch.nn import attention

    if not (
        hasattr(attention, "register_flash_attention_impl") and hasattr(torch.library, "get_kernel")
    ):
        raise UnsupportedError(f"torch {torch.__version__}: {_HELP}")


def _is_active() -> bool:
    return _State.is_on or _State.contexts > 0


def _install_first() -> None:
    """Install ours unless it is active."""
    from torch.nn import attention

    _check_torch()
    if _is_active():
        return
    _calls.update(dict.fromkeys(_SLOTS, 0))
    attention.register_flash_attention_impl(_NAME, register_fn=_Overrides)
    if torch.cuda.is_available():
        _State.before = attention.current_flash_attention_impl()
        attention.activate_flash_attention_impl(_NAME)


def _uninstall() -> None:
    from torch.nn import attention

    if not torch.cuda.is_available() or attention.current_flash_attention_impl() != _NAME:
        return  # another implementation was activated meanwhile
    if _State.before is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(_State.before)


class _Overrides:
    """Our implementations of aten's operators, until `remove`; the handle of torch's registry."""

    def __init__(self, key: str = "CUDA") -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*overrid", category=UserWarning)
            for ours in (*_sdpa_flash.OPERATORS, *_sdpa_efficient.OPERATORS):
                name = ours.__name__
                if hasattr(torch.ops.aten, name):
                    served = _served(ours, _kernel_of_torch(name, key))
                    self._library.impl(name, served, key, with_keyset=True)

    def remove(self) -> None:
        """Give the operators back."""
        if self._library is not None:
            self._library._destroy()
        self._library = None


def _kernel_of_torch(name: str, key: str) -> Any:  # noqa: ANN401 - a kernel of torch, or None
    """Return what an operator does now; None if it has no kernel."""
    try:
        return torch.library.get_kernel(f"aten::{name}", key)
    except RuntimeError:
        return None


def _served(ours: Callable[..., Any], of_torch: Any) -> Callable[..., Any]:  # noqa: ANN401 - a kernel
    """Return an operator's implementation: ours, or torch's where ours refuses a call."""
    name = ours.__name__
    suffix = "_backward" if name.endswith("_backward") else ""
    served, handed_on = "jitattn" + suffix, "torch" + suffix

    def implementation(keys: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the operator's
        if _handed.on:
            return of_torch.call_boxed(keys, *args, **kwargs)
        was_on = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # torch.no_grad() takes 1 us more
            found = ours(*args, **kwargs)
        except UnsupportedError as error:
            if of_torch is None:
                raise
            _warn_once(name, str(error))
        else:
            _count(served)
            return found
        finally:
            torch._C._set_grad_enabled(was_on)
        _count(handed_on)
        _handed.on = True
        try:
            return of_torch.call_boxed(keys, *args, **kwargs)
        finally:
            _handed.on = False

    return implementation


def _count(name: str) -> None:
    with _lock:
        _calls[name] += 1


_warned: Final[set[str]] = set()


def _warn_once(name: str, reason: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"aten::{name}: handed on to torch's kernel: {reason}", stacklevel=3)
