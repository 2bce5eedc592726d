"""Front doors: how they are found, and that they are ours under another name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import jitattn
from jitattn.compat import DOORS


@pytest.mark.parametrize("name", list(DOORS))
def test_a_name_finds_our_door_and_is_given_back(name: str) -> None:
    assert name not in sys.modules
    with jitattn.compat.alias(name):
        found = importlib.import_module(name)
        assert found is importlib.import_module(DOORS[name])
        assert found.__name__ == DOORS[name]
    assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_submodules_are_found_too() -> None:
    with jitattn.compat.alias("flash_cosine_sim_attention"):
        timer = importlib.import_module("flash_cosine_sim_attention.benchmark")
        ours = importlib.import_module("jitattn.compat.flash_cosine_sim_attention.benchmark")
        assert timer is ours
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_cosine_sim_attention.nothing")


def test_undo_is_done_once() -> None:
    found = jitattn.compat.alias("flash_cosine_sim_attention")
    found.undo()
    found.undo()
    assert found not in sys.meta_path


def test_what_is_no_door_is_refused() -> None:
    with pytest.raises(jitattn.InvalidInputError, match="flash_cosine_sim_attention"):
        jitattn.compat.alias("xformers")


def test_an_installed_package_is_not_shadowed_unasked(tmp_path: object) -> None:
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "folder = pathlib.Path(sys.argv[1], 'flash_cosine_sim_attention'); folder.mkdir()\n"
        "(folder / '__init__.py').write_text('real = True')\n"
        "import jitattn, flash_cosine_sim_attention as first\n"
        "try: jitattn.compat.alias('flash_cosine_sim_attention')\n"
        "except jitattn.InvalidInputError as error: print('shadow=True' in str(error))\n"
        "with jitattn.compat.alias('flash_cosine_sim_attention', shadow=True):\n"
        "    import flash_cosine_sim_attention as ours\n"
        "    print(hasattr(ours, 'real'))\n"
        "import flash_cosine_sim_attention as last\n"
        "print(first is last and last.real)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "True"]
