"""What importing does not do, and who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jitattn"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
TORCH_MAY = {
    "append.py", "append_cpu.py", "apply_rotary.py", "attention.py", "autocast.py", "autograd.py",
    "backward.py",
    "compat/fast_ops/flash_attention/_nested.py",
    "compat/fast_ops/flash_attention/attention_ref.py",
    "compat/fast_ops/flash_attention/flash_attention.py",
    "compat/fast_ops/flash_attention/flash_attention_triton.py",
    "compat/_transfer.py", "compat/dkernel/_checks.py", "compat/dkernel/_kept.py",
    "compat/dkernel/_local_stride.py", "compat/dkernel/_module.py",
    "compat/dkernel/_sequences.py", "compat/dkernel/interface.py", "compat/dkernel/utils.py",
    "compat/flash_cosine_sim_attention/_plain.py", "compat/flash_attn/_extension.py",
    "compat/flash_attn/_kvcache.py",
    "compat/flash_attn/_operators.py", "compat/flash_attn/_translate.py",
    "compat/flash_attn/bert_padding.py", "compat/flash_attn/flash_attn_interface.py",
    "compat/flash_attn/layers/rotary.py", "compat/flash_attn/ops/triton/rotary.py",
    "compat/flash_attn/utils/benchmark.py",
    "compat/warp_attention/__init__.py", "compat/warp_attention/baseline_tester.py",
    "compat/warp_attention/util/__init__.py", "compat/warp_attention/warpat_tester.py",
    "compat/flash_cosine_sim_attention/benchmark.py",
    "compat/flash_cosine_sim_attention/transformer.py", "cosine.py", "cpu.py", "cpu_rules.py",
    "dispatch.py", "dropout.py", "encoding.py", "explain.py", "halves.py", "indirect.py",
    "interop.py", "jit/device.py", "kv_parts.py", "kvcache.py", "kvcache_call.py", "kvcache_ops.py",
    "layouts.py", "list_cache.py", "lists.py", "loaded.py", "merge.py", "ops.py", "outputs.py",
    "patterns.py", "problem.py", "quantized.py", "reference.py", "rotary.py", "rotary_cpu.py",
    "rotary_cuda.py", "rotary_ops.py", "score_checks.py", "score_gradients.py", "scores.py",
    "sequences.py", "tensors.py", "transforms.py", "vml.py",
    "warmup.py", "workspace.py", "write_tracking.py",
}  # fmt: skip
CUPY_MAY = {"jit/launch.py"}


def imports_at_run_time(path: Path) -> set[str]:
    """Modules that a file imports, those for type checkers aside."""
    tree = ast.parse((ROOT / path).read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(str(node.module))
    return found


def names(module: str, found: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in found)


@pytest.mark.parametrize("path", MODULES, ids=map(str, MODULES))
def test_import_rules(path: Path) -> None:
    found = imports_at_run_time(path)
    own = path.relative_to("jitattn").as_posix()
    if own not in TORCH_MAY:
        assert not names("torch", found)
    if own not in CUPY_MAY:
        assert not names("cupy", found)
    if own == "jit/enums.py":
        assert not names("jitattn", found)
    if own == "jit/spec.py":
        assert all(names("jitattn.jit.enums", {name}) for name in found if names("jitattn", {name}))
    if own == "reference.py":  # the oracle shares no code with what it judges
        assert not names("jitattn.cpu", found)
        assert not names("jitattn.problem", found)
    if own.startswith("jit/"):  # nothing below asks anything above
        for upper in ("attention", "dispatch", "explain", "problem", "cpu", "interop", "cli"):
            assert not names(f"jitattn.{upper}", found)


def test_import_loads_neither_torch_nor_cupy() -> None:
    code = (
        "import sys, jitattn; jitattn.Causal(); jitattn.InvalidInputError;"
        "print(sorted({'torch', 'cupy', 'numpy', 'filelock'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    import jitattn

    for name in jitattn.__all__:
        assert getattr(jitattn, name) is not None
    assert callable(jitattn.attention)
    assert callable(jitattn.explain)
    with pytest.raises(AttributeError, match="nothing"):
        jitattn.nothing  # noqa: B018


CUDA_FILES = sorted(
    path.relative_to(ROOT / "cuda_src")
    for path in (ROOT / "cuda_src").rglob("*")
    if path.suffix in (".cu", ".cuh")
)


@pytest.mark.parametrize("path", CUDA_FILES, ids=map(str, CUDA_FILES))
def test_cuda_include_rules(path: Path) -> None:
    text = (ROOT / "cuda_src" / path).read_text()
    included = re.findall(r'#include (["<].*?[">])', text)
    own = path.as_posix()
    kernels = {'"jitattn/fwd_sm80.cuh"', '"jitattn/merge.cuh"'}
    if own.startswith("jitattn/ptx/"):
        assert set(included) <= {'"jitattn/types.cuh"'}
    else:
        assert not re.search(r"\basm\b", text)
    if not own.startswith("entry/"):
        assert not kernels & set(included)
        assert text.count("#pragma once") == 1
    for name in included:
        assert name.startswith('"jitattn/') or name == '"jitattn_spec.h"'
