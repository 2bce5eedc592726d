"""Tests tools/compare_sass.py: it compares instructions and constants, not names."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.cpu.tools.loaded import ROOT, load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("compare_sass")


def elf(contents: dict[str, bytes]) -> bytes:
    """A 64-bit ELF file of some sections."""
    names, body, rows = b"\0", b"", [(0, 0, 0, 0)]
    for name, content in contents.items():
        rows.append((len(names), 1, 64 + len(body), len(content)))
        names += name.encode() + b"\0"
        body += content
    rows.append((len(names), 3, 64 + len(body), len(names) + 10))
    body += names + b".shstrtab\0"
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 0x28, 64 + len(body))
    struct.pack_into("<HHH", head, 0x3A, 64, len(rows), len(rows) - 1)
    table = b"".join(
        struct.pack("<IIQQQQ", name, kind, 0, 0, offset, size).ljust(64, b"\0")
        for name, kind, offset, size in rows
    )
    return bytes(head) + body + table


def test_names_and_debug_sections_do_not_count(tool: ModuleType) -> None:
    one = elf({".text.a": b"x" * 32, ".nv.constant0.a": b"cc", ".debug_line": b"1"})
    two = elf({".debug_line": b"other", ".nv.constant0.b": b"cc", ".text.b": b"x" * 32})
    assert tool.code_of(one, 8, 0) == tool.code_of(two, 8, 0)
    assert tool.code_of(one, 8, 0).instructions == 2


@pytest.mark.parametrize(
    "other",
    [
        {".text.a": b"y" * 32, ".nv.constant0.a": b"cc"},
        {".text.a": b"x" * 48, ".nv.constant0.a": b"cc"},
        {".text.a": b"x" * 32, ".nv.constant0.a": b"ccc"},
        {".text.a": b"x" * 32, ".nv.constant2.a": b"cc"},
    ],
)
def test_instructions_and_constants_count(tool: ModuleType, other: dict[str, bytes]) -> None:
    one = tool.code_of(elf({".text.a": b"x" * 32, ".nv.constant0.a": b"cc"}), 8, 0)
    assert one.digest != tool.code_of(elf(other), 8, 0).digest


@pytest.mark.parametrize("cubin", [b"text", elf({".debug_line": b"1"})])
def test_no_cubin_is_no_code(tool: ModuleType, cubin: bytes) -> None:
    with pytest.raises(ValueError, match=r"ELF|without instructions"):
        tool.code_of(cubin, 8, 0)


def test_every_difference_has_a_line(tool: ModuleType) -> None:
    code, failed = tool.Code("a", 8, 32, 0, text="x"), tool.Code(error="CompileError: no")
    before = {"same": code, "other": code, "gone": code, "bad": failed, "table": code}
    after = {
        "same": code, "other": tool.Code("b", 9, 33, 4, text="y"), "new": code, "bad": failed,
        "table": tool.Code("c", 8, 32, 0, text="x"),
    }  # fmt: skip
    lines, equal = tool.compare(before, after)
    assert equal == 1
    assert [line.partition(":")[0] for line in lines] == [
        "failed", "only before", "only after", "differs", "differs in constants alone"
    ]  # fmt: skip
    assert "9 instructions, 33 registers, 4 B spills" in lines[3]


def test_a_sample_is_of_every_family(tool: ModuleType) -> None:
    keys = [
        tool.key_of({"arch": arch, "family": family, "head_dim": dim})
        for arch in ("sm_80", "sm_90")
        for family in ("fwd", "bwd")
        for dim in range(9)
    ]
    chosen = tool.sample(keys, 2)
    assert len(chosen) == 8
    assert tool.sample(reversed(keys), 2) == chosen
    assert sorted(tool.sample(keys, None)) == sorted(keys)


def test_a_family_of_another_name_is_the_same_kernel(tool: ModuleType) -> None:
    assert len(set(tool.RENAMED_FAMILIES.values())) == len(tool.RENAMED_FAMILIES)
    for old, new in tool.RENAMED_FAMILIES.items():
        keys = {tool.key_of({"family": name, "arch": "sm_90"}) for name in (old, new)}
        assert keys == {f'{{"arch":"sm_90","family":"{new}"}}'}
    assert tool.key_of({"family": "fwd"}) == '{"family":"fwd"}'


@pytest.mark.slow
def test_a_changed_template_is_found(tmp_path: Path) -> None:
    for name in ("jitattn", "tools", "cuda_src", "tests/data"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name)
    command = [
        sys.executable, "tools/compare_sass.py", "--before", str(tmp_path / "tree"), "--arch", "80",
        "--short", "--family", "combine", "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip

    def run() -> tuple[int, str]:
        done = subprocess.run(
            command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    assert run() == (0, "1 kernels are identical, 0 are not\n")
    (entry,) = (tmp_path / "tree/cuda_src").rglob("math.cuh")
    text = entry.read_text()
    assert "ex2.approx" in text
    entry.write_text(text.replace("ex2.approx", "lg2.approx"))
    status, said = run()
    assert status == 1
    assert "differs:" in said
    assert "0 kernels are identical, 1 are not" in said
