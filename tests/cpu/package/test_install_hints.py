"""Tests that hints give commands that work from a checkout and from an installed wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from jitattn.errors import CompileError
from jitattn.jit import compilers
from jitattn.spec import install

ROOT = Path(__file__).parents[3]


def test_from_a_checkout_the_folder_is_named() -> None:
    assert install.command("cli") == f'pip install -e "{ROOT}[cli]"'
    assert (ROOT / "pyproject.toml").is_file()


def test_from_a_wheel_the_installed_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "_PACKAGE", tmp_path / "site-packages" / "jitattn")
    assert install.command("cli") == 'pip install "jitattn[cli]"'
    assert install.cuda(12) == 'pip install "jitattn[cu12]"'
    assert install.cuda(13) == install.cuda(14) == 'pip install "jitattn[cu13]"'


def test_every_extra_that_a_hint_names_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in ("cli", "draw", "hf", "cu12", "cu13"):
        assert f"\n{extra} = [" in text


@pytest.mark.parametrize("is_macos", [False, True])
def test_a_missing_compiler_says_how_to_get_one(
    is_macos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "IS_MACOS", is_macos)
    monkeypatch.setattr(compilers, "_remembered", dict)
    compilers._choose.cache_clear()
    with pytest.raises(CompileError) as refused:
        compilers.chosen()
    compilers._choose.cache_clear()
    text = str(refused.value)
    assert text.startswith("no NVRTC is installed: ")
    if is_macos:
        assert text.endswith(install.NO_MACOS)
        assert "the CPU path works here" in text
    else:
        assert f'pip install -e "{ROOT}[cu13]" (driver 580 or newer)' in text
