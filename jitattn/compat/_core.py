"""`jitattn.attention` for the front doors: outside of autocast, as the originals are."""

from __future__ import annotations

from jitattn.api.attention import attention as _attention
from jitattn.values.autocast import outside_autocast

attention = outside_autocast(_attention)
