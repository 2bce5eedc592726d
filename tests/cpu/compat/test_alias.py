"""Tests aliases of several names, with distributions, and from outside of a program."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

import jitattn.compat
from jitattn.compat import alias
from jitattn.errors import InvalidInputError


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_names_or_none() -> None:
    with pytest.raises(InvalidInputError, match="unknown"):
        alias("warp_attention", "unknown")
    assert importlib.util.find_spec("warp_attention") is None
    with alias("warp_attention", "dkernel"):
        import dkernel
        import warp_attention
    assert dkernel is jitattn.compat.dkernel
    assert warp_attention is jitattn.compat.warp_attention
    assert importlib.util.find_spec("dkernel") is None
    with pytest.raises(InvalidInputError, match="name one"):
        alias()


@pytest.mark.parametrize("asked", ["flash-attn", "flash_attn", "Flash.Attn"])
@pytest.mark.parametrize("distribution", [True, "flash_attn", ["flash-attn"]], ids=str)
def test_a_distribution_is_claimed(distribution: bool | str | list[str], asked: str) -> None:
    with alias("flash_attn", distribution=distribution):
        assert importlib.metadata.version(asked).startswith("2.8.")
        found = importlib.metadata.distribution(asked)
        assert found.metadata["Name"] == "flash-attn"
        assert [str(path) for path in found.files or ()] == ["flash_attn/__init__.py"]
        assert found.requires is None
        assert len(found.entry_points) == 0
        assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
        assert [one.metadata["Name"] for one in importlib.metadata.distributions()].count(
            "flash-attn"
        ) == 1
        assert importlib.metadata.version("torch")
        assert not list(importlib.metadata.distributions(path=["/nowhere"]))
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(asked)


def test_it_is_not_claimed_unasked_and_given_back_with_the_last() -> None:
    with alias("flash_attn"):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("flash-attn")
        first, second = (alias("flash_attn", distribution=True, shadow=True) for _ in range(2))
        first.undo()
        first.undo()
        assert importlib.metadata.version("flash-attn")
        second.undo()
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("flash-attn")


def test_packages_that_an_alias_does_not_have() -> None:
    with pytest.raises(InvalidInputError, match="distribution='xformers'"):
        alias("flash_attn", distribution="xformers")
    assert importlib.util.find_spec("flash_attn") is None
    with alias("dkernel", distribution=True):  # it has no version of its own
        pass


def test_diffusers_that_was_imported_before_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    with pytest.warns(UserWarning, match="diffusers was imported before"):
        standing = alias("flash_attn", distribution=True)
    with pytest.warns(UserWarning, match="diffusers"):
        standing.undo()


def test_transformers_looks_again() -> None:
    utils = pytest.importorskip("transformers.utils.import_utils")
    assert not utils._is_package_available("flash_attn")[0]
    with alias("flash_attn", distribution=True):
        found, version = utils._is_package_available("flash_attn", return_version=True)
        assert found
        assert version.startswith("2.8.")
    assert not utils._is_package_available("flash_attn")[0]


SCRIPT = """
import importlib.metadata, sys
import flash_attn
print(flash_attn.__name__, importlib.metadata.version("flash-attn"), *sys.argv[1:])
"""


@pytest.mark.parametrize("names", [None, "flash_attn,dkernel"])
def test_a_program_is_run(tmp_path: Path, names: str | None) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    more = {} if names is None else {"JITATTN_ALIAS": names}
    found = run("-m", "jitattn.compat", str(script), "--flag", "x", **more)
    assert found.stdout.split() == ["jitattn.compat.flash_attn", "2.8.3", "--flag", "x"]
    assert found.returncode == 0
    beside = run("-m", "jitattn.compat", "-m", "json.tool", "--help")
    assert "json.tool" in beside.stdout


def test_a_start_of_python_is_enough(tmp_path: Path) -> None:
    """A sitecustomize that ours hides is run too."""
    site = run("-m", "jitattn.compat", "--site").stdout.strip()
    (tmp_path / "sitecustomize.py").write_text("print('hidden')\n")
    (tmp_path / "program.py").write_text(SCRIPT)
    path = os.pathsep.join([site, str(tmp_path), str(Path(jitattn.__file__).parents[1])])
    program = str(tmp_path / "program.py")
    found = run(program, PYTHONPATH=path, JITATTN_ALIAS="flash_attn")
    assert found.stdout.split() == ["hidden", "jitattn.compat.flash_attn", "2.8.3"]
    plain = run("-c", "print(1)", PYTHONPATH=path)
    assert plain.stdout.split() == ["hidden", "1"]
    assert plain.stderr == ""


def test_names_of_several_packages_together(tmp_path: Path) -> None:
    """A program of which nothing is changed finds all of them, alone and together."""
    script = tmp_path / "program.py"
    script.write_text(
        "import importlib.metadata as metadata\n"
        "import flash_attn.cute, flash_attn_3, flash_attn_interface, sageattention, xformers.ops\n"
        "print(*(metadata.version(name) for name in ('flash-attn', 'flash_attn_3', 'sageattention',"
        " 'xformers')), 'flash-attn-4' in metadata.packages_distributions()['flash_attn'])\n"
    )
    wanted = ["2.8.3", "3.0.0", "2.2.0", "0.0.35", "False"]
    assert run("-m", "jitattn.compat", str(script)).stdout.split() == wanted
    names = "xformers,sageattention,flash_attn,flash_attn_interface"
    found = run("-m", "jitattn.compat", str(script), JITATTN_ALIAS=names)
    assert found.stdout.split() == wanted
    for name in names.split(","):
        (tmp_path / "one.py").write_text(f"import {name}\nprint({name}.__version__)\n")
        one = run("-m", "jitattn.compat", str(tmp_path / "one.py"), JITATTN_ALIAS=name)
        assert one.stdout.strip() in wanted


def test_unknown_names_warn_and_break_nothing() -> None:
    site = run("-m", "jitattn.compat", "--site").stdout.strip()
    path = os.pathsep.join([site, str(Path(jitattn.__file__).parents[1])])
    found = run("-c", "print(1)", PYTHONPATH=path, JITATTN_ALIAS="nothing,dkernel")
    assert found.stdout == "1\n"
    assert "nothing" in found.stderr
    assert found.returncode == 0
    strict = run(
        "-W", "error", "-c", "import dkernel", PYTHONPATH=path, JITATTN_ALIAS="nothing,dkernel"
    )
    assert strict.returncode == 0, strict.stderr
    assert "Error in sitecustomize" not in strict.stderr


def test_a_program_is_needed() -> None:
    assert run("-m", "jitattn.compat").returncode == 2


def test_a_warning_that_is_an_error_leaves_no_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    with pytest.warns(UserWarning, match="diffusers"):
        jitattn.compat.alias("flash_attn", distribution=True).undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="diffusers"):
            jitattn.compat.alias("flash_attn", distribution=True)
    assert importlib.util.find_spec("flash_attn") is None
