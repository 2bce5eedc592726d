"""Tests that the wheel works without the repository."""

from __future__ import annotations

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
    assert "jitattn/py.typed" in names
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
def test_installed_wheel_compiles_a_kernel(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment that sees this one's packages, but for jitattn."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True)
    folder = Path(site.stdout.strip())
    (folder / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", _COMPILE],
        cwd=tmp_path,
        env={**environment, "JITATTN_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, templates, origin, size = json.loads(done.stdout.splitlines()[-1])
    assert Path(package).parent == folder / "jitattn"
    assert Path(templates) == folder / "jitattn" / "_cuda_src"
    assert origin == "compiled"
    assert size > 1000
