"""Tests environment variables: read at first use, validated with clear errors, and documented."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jitattn.cache import settings
from jitattn.errors import InvalidInputError


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("JITATTN_CACHE", "yes", settings.cache_mode),
        ("JITATTN_LOCK_TIMEOUT", "soon", settings.lock_timeout),
        ("JITATTN_LOCK_TIMEOUT", "-1", settings.lock_timeout),
        ("JITATTN_LOCK_TIMEOUT", "nan", settings.lock_timeout),
        *(
            ("JITATTN_LOCK_TIMEOUT", value, settings.lock_timeout)
            for value in ("٦٠", "1_0", "inf", "86401", "", "9" * 5000)
        ),
        *(
            ("JITATTN_CACHE_MAX_BYTES", value, settings.cache_max_bytes)
            for value in ("٣٢M", "³G", "9" * 5000, "-1", "1_0")
        ),
        ("JITATTN_NVRTC", "11", settings.nvrtc_major),
        ("JITATTN_NVRTC", "१३", settings.nvrtc_major),
        ("JITATTN_LINEINFO", "१", settings.lineinfo),
        ("JITATTN_LINEINFO", "maybe", settings.lineinfo),
        ("JITATTN_DEBUG_ASSERT", "2", settings.debug_assert),
    ],
)
def test_bad_values_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: Callable[[], object]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match=f"{name}='{value}'"):
        read()


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert settings.cache_mode() == "rw"
    assert settings.lock_timeout() == 60
    assert settings.nvrtc_major() is None
    assert settings.cache_dir() is None
    assert not settings.lineinfo()


def test_the_guide_repeats_the_table() -> None:
    page = Path(__file__).parents[3] / "tools" / "guide" / "cache.md"
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(JITATTN_\w+)` \| (.*?) \| (.*?) \|$", text, flags=re.MULTILINE)
    assert {name: (default, text) for name, default, text in rows} == settings.VARIABLES
