"""Tracing: while it lasts, torch's functions note what they would do to symbols.

A function is called once, with symbols (`symbols.py`); what it does to them
(`traced_operations.py`) is its program. Numbers become arguments, in the order of their use, and so
do captured tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch.overrides import TorchFunctionMode

from jitattn.values import traced_operations  # noqa: F401 - gives symbols their operations
from jitattn.values.symbols import has_symbol, of_torch, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_RANDOM: Final = frozenset((
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
    "multinomial", "normal", "poisson", "dropout", "uniform_", "normal_", "random_",
))  # fmt: skip


class Tracing(TorchFunctionMode):
    """Catches captured tensors indexed by symbols, and what must not be in a function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what the function returns
        """Trace, refuse or call a function of torch's."""
        given = kwargs or {}
        if has_symbol(args) or has_symbol(given):
            return of_torch(func, args, given)
        name = getattr(func, "__name__", "")
        if name in _RANDOM:
            raise refusal(f"random numbers ({name}) in a score or mask function")
        if name == "__setitem__":
            raise refusal("a score or mask function must not write to tensors")
        if name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
            raise refusal(
                f"{name} of a captured tensor waits for the device, and its value may change: "
                "read it at an index"
            )
        return func(*args, **given)
