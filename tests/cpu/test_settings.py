"""Environment variables: read late, refused clearly, and documented."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jitattn.errors import InvalidInputError
from jitattn.jit import settings


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("JITATTN_CACHE", "yes", settings.cache_mode),
        ("JITATTN_LOCK_TIMEOUT", "soon", settings.lock_timeout),
        ("JITATTN_LOCK_TIMEOUT", "-1", settings.lock_timeout),
        ("JITATTN_LOCK_TIMEOUT", "nan", settings.lock_timeout),
        ("JITATTN_NVRTC", "11", settings.nvrtc_major),
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


def test_readme_repeats_the_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| `(JITATTN_\w+)` \| (.*?) \| (.*?) \|$", readme, flags=re.MULTILINE)
    assert {name: (default, text) for name, default, text in rows} == settings.VARIABLES
