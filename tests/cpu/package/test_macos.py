"""Tests what is there on macOS, in a process that believes to run on it and has no CUDA packages.

It is no Mac: paths, torch and the file system are those of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

_AS_ON_MACOS = """
import importlib.metadata, json, sys, sysconfig
sysconfig.get_paths()  # which reads a file of the platform
sys.platform = "darwin"
real = importlib.metadata.distribution
def distribution(name):
    if name.startswith(("cupy", "nvidia")):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
sys.modules["cupy"] = None
"""
_CALL = """
import torch, jitattn
q = torch.randn(1, 4, 2, 16, requires_grad=True)
out = jitattn.attention(q, q, q, mask=jitattn.Causal())
out.sum().backward()
print(list(out.shape), bool(q.grad.isfinite().all()))
"""
_COMMANDS = """
from click.testing import CliRunner
from jitattn.cli import main
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, words)
    print(json.dumps([done.exit_code, done.output]))
"""


def run(before: str, code: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", before + _AS_ON_MACOS + code, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_cpu_path_and_its_gradients() -> None:
    assert run("import torch, torch._dynamo", _CALL) == ["[1, 4, 2, 16] True"]


def test_commands_work_but_compiling() -> None:
    prebuild = ["prebuild", "--arch", "90", "--preset", "gpt2"]
    wanted = {
        ("list",): (0, "no kernels"),
        ("verify",): (0, "0 kernels checked, 0 bad"),
        (*prebuild, "--dry-run"): (0, "to make, 0 cached: about"),
        tuple(prebuild): (1, "no NVRTC is installed: there is no NVRTC and no CUDA for macOS"),
        ("doctor",): (0, "macOS has no CUDA"),
    }
    lines = run("import platformdirs, filelock, rich.progress", _COMMANDS, json.dumps([*wanted]))
    for line, (command, (status, text)) in zip(lines, wanted.items(), strict=True):
        code, output = json.loads(line)
        assert code == status, (command, output)
        assert text in output, command
