"""Tests the import aliases of the front doors."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import pickle
import subprocess
import sys
import types

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
    first = jitattn.compat.alias("flash_cosine_sim_attention")
    second = jitattn.compat.alias("flash_cosine_sim_attention")
    first.undo()
    first.undo()
    importlib.import_module("flash_cosine_sim_attention")
    second.undo()
    second.undo()
    assert not found_by_aliases()


def found_by_aliases() -> list[str]:
    """Names that aliases have left behind."""
    return [name for name in sys.modules if name.split(".")[0] in DOORS]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_aliases_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    """Of one name, of another for the same module, and of a third."""
    names = ("flash_attn", "flash_attn_vllm", "flash_attn", "dkernel")
    aliases = []
    for name in names:
        aliases.append(jitattn.compat.alias(name))
        importlib.import_module(name)
    importlib.import_module("flash_attn.bert_padding")
    standing = list(names)
    for idx in order:
        aliases[idx].undo()
        standing.remove(names[idx])
        for name in names:
            if name in standing:
                assert importlib.import_module(name) is importlib.import_module(DOORS[name])
            else:
                with pytest.raises(ModuleNotFoundError):
                    importlib.import_module(name)
    assert not found_by_aliases()


def test_our_modules_keep_their_specs() -> None:
    names = ("jitattn.compat.dkernel", "jitattn.compat.dkernel.utils")
    before = [importlib.import_module(name).__spec__ for name in names]
    with jitattn.compat.alias("dkernel"):
        assert importlib.util.find_spec("dkernel") is not None
        assert importlib.util.find_spec("dkernel.nothing") is None
        importlib.import_module("dkernel.utils")
    for name, spec in zip(names, before, strict=True):
        module = importlib.import_module(name)
        assert module.__spec__ is spec
        assert spec.name == module.__name__ == name
        assert spec.loader is module.__loader__
    done = run(
        "import importlib, jitattn.compat\n"
        "with jitattn.compat.alias('dkernel'):\n"
        "    import dkernel, dkernel.utils\n"
        "    assert importlib.reload(dkernel) is dkernel\n"
        "    assert dkernel.__spec__.name == 'jitattn.compat.dkernel'\n"
        "import jitattn.compat.dkernel as ours\n"
        "print(importlib.reload(ours) is ours is dkernel, importlib.reload(ours.utils).__name__)\n"
    )
    assert done == "True jitattn.compat.dkernel.utils"


def test_a_module_made_by_hand_has_what_ours_has() -> None:
    with jitattn.compat.alias("dkernel"):
        spec = importlib.util.find_spec("dkernel.utils")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        ours = importlib.import_module("jitattn.compat.dkernel.utils")
        assert module.get_sparse_attn_mask is ours.get_sparse_attn_mask
    assert not found_by_aliases()


def test_what_was_imported_by_an_alias_can_be_pickled() -> None:
    with jitattn.compat.alias("dkernel"):
        theirs = importlib.import_module("dkernel")
        layer = theirs.LocalStrideSparseAttention(2, 128, 16, 2, 4)
        saved = pickle.dumps([theirs.SparseAttention, layer])
        assert b"jitattn.compat.dkernel" in saved
        # What the original has pickled names its modules.
        text = b"cdkernel.interface\nSparseAttention\n."
        assert pickle.loads(text) is theirs.SparseAttention
    found, again = pickle.loads(saved)
    assert found is theirs.SparseAttention
    assert type(again) is theirs.LocalStrideSparseAttention
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(text)


def test_a_module_that_was_imported_before_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of somebody's own, with a submodule, that no finder finds."""
    for name in ("fast_ops", "fast_ops.flash_attention"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    before = sys.modules["fast_ops"], sys.modules["fast_ops.flash_attention"]
    with pytest.raises(jitattn.InvalidInputError, match="shadow=True"):
        jitattn.compat.alias("fast_ops")
    with jitattn.compat.alias("fast_ops", shadow=True), jitattn.compat.alias("fast_ops"):
        ours = importlib.import_module("fast_ops.flash_attention.attention_ref")
        assert ours.__name__ == "jitattn.compat.fast_ops.flash_attention.attention_ref"
        assert sys.modules["fast_ops"] is sys.modules["jitattn.compat.fast_ops"]
    assert (sys.modules["fast_ops"], sys.modules["fast_ops.flash_attention"]) == before
    assert "fast_ops.flash_attention.attention_ref" not in sys.modules


def test_threads_import_at_once() -> None:
    """In a process where no door is, and aliases come and go meanwhile.

    A thread that asks while another imports may be handed the module that stands for ours, whose
    names are ours. What the doors import is there: threads that import it at once are Python's own
    affair, which says "deadlock detected" now and then.
    """
    done = run(
        "import importlib, sys, threading, jitattn.compat\n"
        "from jitattn import attention, attention_with_kvcache, explain, merge, reference\n"
        "sys.setswitchinterval(1e-5)\n"
        "names = ['dkernel.utils:get_sparse_attn_mask', 'dkernel:SparseAttention',\n"
        "         'fast_ops.flash_attention.flash_attention:FlashAttentionFunction',\n"
        "         'flash_attn.bert_padding:pad_input', 'flash_attn_vllm.bert_padding:pad_input',\n"
        "         'warp_attention:set_default_gear']\n"
        "doors, wrong, start = jitattn.compat.DOORS, [], threading.Barrier(12)\n"
        "statement = lambda name: __import__(name, fromlist=['x'])\n"
        "def work(idx):\n"
        "    start.wait()\n"
        "    for turn in range(20):\n"
        "        name, _, symbol = names[(idx + turn) % len(names)].partition(':')\n"
        "        door, _, rest = name.partition('.')\n"
        "        ours = doors[door] + ('.' + rest if rest else '')\n"
        "        with jitattn.compat.alias(door):\n"
        "            load = importlib.import_module if turn % 2 else statement\n"
        "            try: found = getattr(load(name), symbol)\n"
        "            except BaseException as error: wrong.append(repr(error)); continue\n"
        "            module = sys.modules[ours]\n"
        "            if module.__spec__.name != ours or found is not getattr(module, symbol):\n"
        "                wrong.append(name)\n"
        "threads = [threading.Thread(target=work, args=(idx,)) for idx in range(12)]\n"
        "for one in threads: one.start()\n"
        "for one in threads: one.join()\n"
        "print(wrong, [key for key in sys.modules if key.split('.')[0] in doors])\n"
    )
    assert done == "[] []"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_no_door_is_refused() -> None:
    with pytest.raises(jitattn.InvalidInputError, match="flash_cosine_sim_attention"):
        jitattn.compat.alias("triton")


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
