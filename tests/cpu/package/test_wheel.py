"""Tests that the wheel works without the repository."""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

_COMPILE = """
import json, jitattn
from jitattn.jit import build, sources
from jitattn.kernels.combine import CombineSpec
from jitattn.spec.enums import Dtype
spec = CombineSpec(dtype=Dtype.FP16, out_dtype=Dtype.FP16, head_dim_v=16, arch="sm_86")
built = build.build(spec)
print(json.dumps([jitattn.__file__, str(sources.locate()), built.origin, len(built.cubin)]))
"""


_TRAIN = """
import torch, jitattn
torch.manual_seed(0)
x, target = torch.randn(2, 16, 4, 8), torch.randn(2, 16, 4, 8)
weights = [torch.nn.Parameter(torch.eye(8)) for _ in "qkv"]
optimizer = torch.optim.SGD(weights, 0.1)
for _ in range(2):
    out = jitattn.attention(*(x @ one for one in weights), mask=jitattn.Causal())
    loss = (out - target).square().mean()
    print(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_is_pure_and_whole(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"jitattn/py.typed", "jitattn/presets.toml", "jitattn/_tools/demo.py"} <= names
    templates = [
        path.relative_to(ROOT / "cuda_src").as_posix()
        for folder in ("entry", "jitattn")
        for path in (ROOT / "cuda_src" / folder).rglob("*.cu*")
    ]
    assert len(templates) > 15
    assert {f"jitattn/_cuda_src/{name}" for name in templates} <= names
    assert not [name for name in names if name.startswith(("tests", "tools", "cuda_src"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_metadata_of_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(opened.read(name))
    needs = metadata.get_all("Requires-Dist", [])
    assert "torch>=2.4" in needs
    of_cuda = [one for one in needs if one.startswith(("cupy", "nvidia"))]
    assert len(of_cuda) >= 4
    assert all("sys_platform != 'darwin'" in one for one in of_cuda)  # there is none for macOS
    assert "Operating System :: MacOS" in metadata.get_all("Classifier", [])
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fresh environment that sees this one's packages, but for jitattn: python and its site."""
    tmp_path = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True)
    folder = Path(site.stdout.strip())
    (folder / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python, folder


def run_away(python: Path, folder: Path, *arguments: str) -> str:
    """Run the environment's Python in a folder away from the checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env={**environment, "JITATTN_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_installed_wheel_trains_and_has_its_commands(
    installed: tuple[Path, Path], tmp_path: Path
) -> None:
    python, _ = installed
    before, after = map(float, run_away(python, tmp_path, "-c", _TRAIN).split())
    assert after < before
    assert run_away(python, tmp_path, "-m", "jitattn", "--version").startswith("jitattn ")
    assert run_away(python, tmp_path, "-m", "jitattn.demo", "--help").startswith("usage: demo.py")
    hint = "import jitattn.spec.install as i; print(i.command('cli'))"
    assert run_away(python, tmp_path, "-c", hint) == 'pip install "jitattn[cli]"\n'


@pytest.mark.slow
def test_installed_wheel_compiles_a_kernel(installed: tuple[Path, Path], tmp_path: Path) -> None:
    python, folder = installed
    shown = run_away(python, tmp_path, "-c", _COMPILE)
    package, templates, origin, size = json.loads(shown.splitlines()[-1])
    assert Path(package).parent == folder / "jitattn"
    assert Path(templates) == folder / "jitattn" / "_cuda_src"
    assert origin == "compiled"
    assert size > 1000
