"""`jitattn.attention` for the front doors: outside of autocast, as the originals are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitattn.api.attention import attention as _attention
from jitattn.values.autocast import outside_autocast

_given: Callable[..., Any] = _attention
attention = outside_autocast(_given)
