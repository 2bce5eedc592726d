"""The code blocks of the guide, the README and the doors' pages, run one after another by page.

A block in ``text`` after one in ``python`` is what that prints. Comments at the head of a page
steer the tests: ``<!-- needs: MODULE, ... -->`` names what it is skipped without, and
``<!-- ranks: 2 -->`` says that it is a program for so many processes.
``python -m tests.support.guide PAGE ...`` runs pages.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "tools" / "guide"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"^<!-- (needs|ranks)(?:: (.*?))? -->$", re.MULTILINE)
#: How pages choose a device, and what the tests of the CPU path make of it.
_DEVICES = {
    '"cuda" if torch.cuda.is_available() else "cpu"': '"cpu"',
    'device="cuda"': 'device="cpu"',
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int  #: of the page, on which its text begins


def pages() -> list[str]:
    """Return all pages that may have code, by their paths in the repository."""
    package = ROOT / "jitattn"
    doors = sorted((package / "compat").rglob("README.md"))
    found = [ROOT / "README.md", *sorted(GUIDE.glob("*.md")), *doors]
    return [path.relative_to(ROOT).as_posix() for path in found]


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text[: found.start(2)].count("\n") + 1)
        for found in _BLOCK.finditer(text)
    ]


def code_of(page: str) -> str:
    """Return the Python code of a page."""
    return "".join(block.text for block in blocks_of(page) if block.language == "python")


def marks_of(page: str) -> dict[str, str]:
    """Return the comments that steer the tests of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return {name: value or "" for name, value in _MARK.findall(text)}


def commands_of(page: str) -> list[str]:
    """Return the commands of a page's shell blocks and Dockerfiles, continued lines joined."""
    lines = []
    for block in blocks_of(page):
        if block.language in ("sh", "dockerfile"):
            lines += block.text.replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


def run(page: str) -> int:
    """Run the Python blocks of a page on the CPU; return how many there are.

    Raises
    ------
    AssertionError
        A block prints something else than the page says.
    Exception
        Whatever a block raises; a warning is an error.
    """
    blocks = blocks_of(page)
    module = types.ModuleType(Path(page).stem.replace("-", "_"))
    count = 0
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        count += 1
        printed = _output_of(block, page, module)
        if after is not None and after.language == "text":
            assert printed == after.text, f"{page}:{block.line} prints {printed}"
    return count


def _output_of(block: Block, page: str, module: types.ModuleType) -> str:
    """Execute a block in a module, and return what it prints."""
    text = block.text
    for own, ours in _DEVICES.items():
        text = text.replace(own, ours)
    code = compile("\n" * (block.line - 1) + text, str(ROOT / page), "exec")
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("error")
        exec(code, vars(module))
    return printed.getvalue()


def main() -> None:
    """Run the pages that the command line names, and say how many blocks each has."""
    torch.set_num_threads(1)
    for page in sys.argv[1:]:
        sys.stdout.write(f"{page}: {run(page)} blocks\n")


if __name__ == "__main__":
    main()
