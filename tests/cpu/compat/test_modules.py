"""Tests that names exist at the module paths of the published packages."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from types import FunctionType

import torch
from torch import Tensor

import jitattn
from jitattn.compat import flash_cosine_sim_attention as cosine
from jitattn.compat import warp_attention
from jitattn.compat.flash_cosine_sim_attention import flash_cosine_sim_attention
from jitattn.compat.flash_cosine_sim_attention.flash_cosine_sim_attention import (
    FlashCosineSimAttention,
    flash_cosine_sim_attention_cpu,
    flash_cosine_sim_attention_cuda,
    grouped_l2norm,
    l2norm,
    l2norm_tensors,
)
from jitattn.compat.flash_cosine_sim_attention.triton_flash_cosine_sim_attention import (
    triton_flash_cosine_sim_attention,
)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 9, 16, generator=generator) for _ in range(3)]


def test_a_function_keeps_the_name_of_its_module() -> None:
    for name in ("flash_cosine_sim_attention", "triton_flash_cosine_sim_attention"):
        module = importlib.import_module(f"{cosine.__name__}.{name}")
        function = getattr(module, name)
        assert isinstance(function, FunctionType)
        assert getattr(cosine, name) is function
    code = (
        "import jitattn.compat; jitattn.compat.alias('flash_cosine_sim_attention');"
        "from flash_cosine_sim_attention.flash_cosine_sim_attention import l2norm;"
        "import flash_cosine_sim_attention as package;"
        "from flash_cosine_sim_attention import flash_cosine_sim_attention as function;"
        "print(type(function).__name__, package.flash_cosine_sim_attention is function)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["function", "True"]


def test_cosine_attention_of_tensors_that_are_normalised() -> None:
    q, k, v = inputs()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 7:] = False
    wanted = flash_cosine_sim_attention(q, k, v, mask, scale=5, use_triton=True)
    q, k = l2norm_tensors(q, k)
    torch.testing.assert_close(q, l2norm(inputs()[0]))
    for function in (
        flash_cosine_sim_attention_cuda,
        flash_cosine_sim_attention_cpu,
        FlashCosineSimAttention.apply,
    ):
        torch.testing.assert_close(function(q, k, v, mask, 5, False), wanted)
    tiled = flash_cosine_sim_attention_cpu(q, k, v, mask, 5, False, row_tile_size=4)
    torch.testing.assert_close(tiled, wanted)


def test_the_triton_kernel_by_its_name() -> None:
    q, k, v = inputs()
    out = triton_flash_cosine_sim_attention(q, k, v, None, 3, 2, True, sequence_parallel=True)
    assert torch.equal(out, flash_cosine_sim_attention(q, k, v, scale=3, groups=2, causal=True))
    halves = grouped_l2norm(q, 2).unflatten(-1, (2, 8)).norm(dim=-1)
    torch.testing.assert_close(halves, torch.ones_like(halves))
    version = importlib.import_module(f"{cosine.__name__}.version")
    assert version.__version__ == jitattn.__version__


def test_places_of_warp_attention() -> None:
    package = "jitattn.compat.warp_attention.util"
    for module, names in (
        ("util", ("cuda_timeit", "attn_flop", "mse", "get_absolute_path")),
        ("baseline_tester", ("attn", "test_torch_naive", "test_torch_sdpa", "test_flash_attn")),
        ("warpat_tester", ("test_warpat",)),
        ("compare", ("compare",)),
        ("tuning", ("tune",)),
    ):
        found = importlib.import_module(f"{package}.{module}")
        where = {"compare": "warpat_tester", "tuning": "warpat_tester"}.get(module, module)
        own = importlib.import_module(f"jitattn.compat.warp_attention.{where}")
        for name in names:
            assert getattr(found, name) is getattr(own, name)
    assert warp_attention.util.tune is importlib.import_module(f"{package}.tuning").tune
    version = importlib.import_module("jitattn.compat.warp_attention._version")
    assert version.__version__ == warp_attention.__version__


def test_a_logarithm() -> None:
    for x in (1, 2, 3, 4, 5, 1023, 1024, 1025):
        assert warp_attention.log_next_power_of_2(x) == math.ceil(math.log2(x))
    assert warp_attention.log_next_power_of_2(0) == 0
