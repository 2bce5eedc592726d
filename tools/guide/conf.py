"""Sphinx's settings for the guide: ``sphinx-build -W tools/guide build/guide``, from the root.

What the guide shows and does not keep is made into the folder ``made`` first: pictures of masks and
the plot of the gears (`pictures.py`), and the READMEs of the front doors as pages. In the pages,
``<!-- table of PATH: CELL -->`` stands for the table of a file whose head begins with a cell, and
what is between ``<!-- if NAME -->`` and ``<!-- end if -->`` is left out where jitattn lacks a name.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from pictures import gear_plot, mask_pictures

import jitattn

project = "jitattn"
author = copyright = "The jitattn authors"
version = release = jitattn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]

html_theme = "pydata_sphinx_theme"
html_title = f"jitattn {release}"
html_show_sourcelink = False
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_sidebars = {"**": ["globaltoc.html"]}
html_theme_options = {
    "navbar_center": [],  # the menu is at the left of every page
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": {"**": [], "api": ["page-toc"]},  # the menu has sections
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}

myst_heading_anchors = 3
default_role = "code"  # in docstrings, `name` is code
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which types do not
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

_TABLE: Final = re.compile(r"^<!-- table of (?P<path>\S+): (?P<cell>[^>]+) -->$", re.MULTILINE)
_IF: Final = re.compile(r"^<!-- if (?P<name>\S+) -->\n(?P<text>.*?)^<!-- end if -->$", re.M | re.S)
#: What is code or a role already, or a character that has a meaning in reStructuredText only.
_SPECIAL: Final = re.compile(r"(``.+?``|`.+?`|\|)")
#: Links between READMEs that become pages.
_LINKS: Final = {"](cute/README.md)": "](flash_attn_cute.md)"}


def make_files(app: Any) -> None:
    """Make pictures and the pages of the doors."""
    del app
    made = HERE / "made"
    shutil.rmtree(made, ignore_errors=True)
    (made / "doors").mkdir(parents=True)
    for name, picture in {**mask_pictures(), "gears.png": gear_plot()}.items():
        (made / name).write_bytes(picture)
    shutil.copy(ROOT / "cuda_src" / "notes" / "0010-heat-map.png", made / "heat-map.png")
    package = ROOT / "jitattn"
    for path in sorted([*package.glob("compat/**/README.md"), *package.glob("*/README.md")]):
        text = path.read_text(encoding="utf-8")
        for link, other in _LINKS.items():
            text = text.replace(link, other)
        name = "_".join(part for part in path.parent.relative_to(package).parts if part != "compat")
        (made / "doors" / f"{name}.md").write_text(text, encoding="utf-8")


def fill_in(app: Any, name: str, source: list[str]) -> None:
    """Replace the marks of a page."""
    del app, name
    text = _IF.sub(lambda found: found["text"] if is_there(found["name"]) else "", source[0])
    source[0] = _TABLE.sub(lambda found: table_of(ROOT / found["path"], found["cell"]), text)


def is_there(name: str) -> bool:
    """Return whether jitattn has a name, such as "jitattn.patterns.text"."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute) or bool(
            importlib.import_module(name)
        )
    except ImportError:
        return False


def table_of(path: Path, first_cell: str) -> str:
    """Return the table of a file whose head begins with a cell; without the file, nothing."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    stop = next(n for n in range(start, len(lines) + 1) if not "".join(lines[n : n + 1]))
    return "\n".join(lines[start:stop])


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let a bar in a docstring be a bar: |x| would be a substitution."""
    del app, what, name, obj, options
    for number, line in enumerate(lines):
        parts = _SPECIAL.split(line)
        lines[number] = "".join("\\|" if part == "|" else part for part in parts)


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("builder-inited", make_files)
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", escape)
