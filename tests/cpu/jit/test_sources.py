"""Tests locating and reading kernel templates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jitattn.errors import InternalError
from jitattn.jit import sources


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the templates to edit."""
    shutil.copytree(sources.locate(), tmp_path / "tree", ignore=shutil.ignore_patterns("notes"))
    return tmp_path / "tree"


def test_wheel_and_checkout_are_both_found(tmp_path: Path) -> None:
    package = tmp_path / "site" / "jitattn"
    (tmp_path / "site" / "cuda_src" / "entry").mkdir(parents=True)
    assert sources.locate(package) == tmp_path / "site" / "cuda_src"
    (package / "_cuda_src" / "entry").mkdir(parents=True)
    sources.locate.cache_clear()
    assert sources.locate(package) == package / "_cuda_src"


def test_missing_templates_say_so(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="install jitattn again"):
        sources.locate(tmp_path / "jitattn")


def test_closure_holds_what_is_included_and_no_more() -> None:
    forward, combine = sources.closure("fwd"), sources.closure("combine")
    assert "jitattn/fwd/sm80/kernel.cuh" in forward.headers
    assert "jitattn/ptx/ldmatrix.cuh" in forward.headers
    assert "jitattn/fwd/sm80/kernel.cuh" not in combine.headers
    assert "jitattn_spec.h" not in forward.headers


def test_digest_follows_the_text(tree: Path) -> None:
    before = sources.closure("combine", tree).digest
    header = tree / "jitattn" / "types.cuh"
    text = header.read_text()
    sources.closure.cache_clear()
    header.write_bytes(text.replace("\n", "\r\n").encode())
    assert sources.closure("combine", tree).digest == before  # line ends do not count
    sources.closure.cache_clear()
    header.write_text(text + "// a change\n")
    assert sources.closure("combine", tree).digest != before


@pytest.mark.parametrize(
    "line", ["#include <cuda_fp16.h>", '#include "other.h"', '#include "jitattn/../x.cuh"']
)
def test_other_includes_are_refused(tree: Path, line: str) -> None:
    header = tree / "jitattn" / "types.cuh"
    header.write_text(line + "\n" + header.read_text())
    with pytest.raises(InternalError, match="includes"):
        sources.closure("combine", tree)


def test_missing_header_is_named(tree: Path) -> None:
    (tree / "jitattn" / "types.cuh").unlink()
    with pytest.raises(InternalError, match=r"types\.cuh"):
        sources.closure("combine", tree)
