"""Tests that the code and the commands of the guide, the README and the doors' pages work.

Every page runs as it is written, from its first block to its last, on the CPU path.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from jitattn.values.gears import get_default_gear
from tests.support import guide

PAGES = [page for page in guide.pages() if guide.code_of(page)]
#: Programs for several processes, pages that change the process, and all others.
RANKS = [page for page in PAGES if "ranks" in guide.marks_of(page)]
APART = [page for page in PAGES if re.search(r"\b(alias|register)\(", guide.code_of(page))]
HERE = [page for page in PAGES if page not in {*RANKS, *APART}]
#: Pages that share a process.
GROUPS = [
    [page for page in APART if not page.startswith("jitattn/")],
    [page for page in APART if page.startswith("jitattn/")],
]
COMMANDS = [(page, line) for page in guide.pages() for line in guide.commands_of(page)]


def _skip_without_needs(page: str) -> None:
    for name in guide.marks_of(page).get("needs", "").replace(",", " ").split():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")


def _run(pages: list[str], launcher: list[str], times: int = 1) -> None:
    """Run pages in a process, or so many, and count the blocks that were executed."""
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.support.guide", *pages],
        cwd=guide.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for page in pages:
        count = sum(block.language == "python" for block in guide.blocks_of(page))
        assert done.stdout.count(f"{page}: {count} blocks") == times


@pytest.mark.parametrize("page", HERE)
def test_a_page_runs(page: str) -> None:
    _skip_without_needs(page)
    gear, rng = get_default_gear(), torch.get_rng_state()
    with torch.enable_grad():
        assert guide.run(page)
    assert get_default_gear() == gear
    torch.set_rng_state(rng)


@pytest.mark.slow
@pytest.mark.parametrize("pages", GROUPS, ids=["recipes", "doors"])
def test_pages_that_change_their_process_run(pages: list[str]) -> None:
    for page in pages:
        _skip_without_needs(page)
    assert pages
    _run(pages, [])


@pytest.mark.slow
@pytest.mark.parametrize("page", RANKS)
def test_a_program_for_several_processes_runs(page: str) -> None:
    _skip_without_needs(page)
    ranks = int(guide.marks_of(page)["ranks"])
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    _run([page], launcher, ranks)


def test_every_page_is_run() -> None:
    """The guide has its pages, and code that is no Python is of a kind that is looked at."""
    assert len(PAGES) >= 20
    languages = {block.language for page in guide.pages() for block in guide.blocks_of(page)}
    assert languages <= {"python", "text", "sh", "dockerfile"}


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if "jitattn-cache" in c[1]])
def test_commands_of_the_cache_are_understood(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are parsed; what compiles nothing is run."""
    click = pytest.importorskip("click")
    from click.testing import CliRunner

    from jitattn.cli import main

    monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for one in re.split(r"&&|\|", command):
        words = shlex.split(one)
        if "jitattn-cache" not in words:
            continue
        name, *given = words[words.index("jitattn-cache") + 1 :]
        subcommand = main.commands[name]
        subcommand.make_context(name, list(given))  # raises for what it does not know
        if name == "prebuild" and "--presets" not in given and "--spec" not in given:
            done = CliRunner().invoke(main, [name, *given, "--dry-run"])
            assert done.exit_code == 0, (page, done.output)
        if name in ("path", "stats", "list", "verify"):
            assert CliRunner().invoke(main, [name, *given]).exit_code == 0, page
    assert isinstance(main, click.Group)


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if "jitattn-cache" not in c[1]])
def test_what_other_commands_name_exists(page: str, command: str) -> None:
    """Extras, files and modules; a module of ours that is missing is a skip by name."""
    text = (guide.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for found in re.findall(r"\[([a-z0-9,]+)\]\"", command):
        assert set(found.split(",")) <= extras.keys(), page
    for path in re.findall(r"(?<=\s)((?:tools|tests)/\S+)", command):
        assert (guide.ROOT / path).exists(), page
    for module in re.findall(r"python -m (jitattn\S*)", command):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")


def test_links_of_the_readme_lead_to_files() -> None:
    text = (guide.ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 25
    for link in links:
        assert (guide.ROOT / link).is_file(), link


@pytest.mark.slow
def test_the_guide_builds_without_warnings(tmp_path: Path) -> None:
    for name in ("sphinx", "myst_parser", "pydata_sphinx_theme", "matplotlib", "PIL"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-d", str(tmp_path / "state"),
         "tools/guide", str(tmp_path / "site")],
        cwd=guide.ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr, done.stderr
    for page in guide.GUIDE.glob("*.md"):
        built = (tmp_path / "site" / f"{page.stem}.html").read_text(encoding="utf-8")
        folder = tmp_path / "site"
        images = re.findall(r'<img [^>]*src="([^"]+)"', built)
        assert all((folder / image).is_file() for image in images), page
        assert len(images) >= page.read_text(encoding="utf-8").count("!["), page
