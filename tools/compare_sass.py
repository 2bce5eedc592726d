"""Compare the machine code of the compile matrix in two source trees. No GPU needed.

``python tools/compare_sass.py --before PATH`` builds the kernels of both trees, each by its own
Python, and compares instructions and constants: names and debug sections do not count. It prints
the kernels that differ, and returns 1 if there are any or if a tree lacks some.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REPOSITORY: Final = Path(__file__).resolve().parents[1]
#: Bytes of an instruction, of every architecture since sm_70.
INSTRUCTION_BYTES: Final = 16
#: Modules that hold `build(spec)`: now, and before modules lay in folders.
BUILD_MODULES: Final = ("jitattn.jit.build", "jitattn.build")
#: Kernel families that had another name in older trees, by that name.
RENAMED_FAMILIES: Final = {
    "merge": "combine",
    "merge_grad": "combine_grad",
    "stats": "bwd_preprocess",
    "round": "bwd_postprocess",
    "split_halves": "split_fp32",
}


@dataclass(frozen=True, slots=True)
class Code:
    """The machine code of one kernel, as a digest and figures, or a build error."""

    digest: str = ""
    instructions: int = 0
    registers: int = 0
    spill_bytes: int = 0
    error: str = ""
    text: str = ""  #: digest of the instructions alone

    def __str__(self) -> str:
        if self.error:
            return self.error.partition("\n")[0]
        return (
            f"{self.instructions} instructions, {self.registers} registers, "
            f"{self.spill_bytes} B spills"
        )


def sections(cubin: bytes) -> dict[str, bytes]:
    """Return the contents of the sections of a 64-bit little-endian ELF file by name."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    _, _, _, _, names, length = rows[names_at]
    text = cubin[names : names + length]
    return {
        text[name : text.index(b"\0", name)].decode(): cubin[offset : offset + extent]
        for name, kind, _, _, offset, extent in rows
        if kind not in (0, 8)  # SHT_NULL; SHT_NOBITS takes no bytes
    }


def code_of(cubin: bytes, registers: int, spill_bytes: int) -> Code:
    """Digest the instructions and the constants of a cubin.

    Raises
    ------
    ValueError
        It is no cubin, or has no instructions.
    """
    found = sections(cubin)
    # Sections are digested by kind, not by name (.text.<kernel>, .nv.constant<bank>.<kernel>).
    kept = sorted(
        (".".join(name.split(".")[: 2 if name.startswith(".text.") else 3]), content)
        for name, content in found.items()
        if name.startswith((".text.", ".nv.constant"))
    )
    size = sum(len(content) for name, content in kept if name == ".text")
    if not size:
        raise ValueError("a cubin without instructions")
    checksum, text = (hashlib.sha256(usedforsecurity=False) for _ in range(2))
    for name, content in kept:
        checksum.update(f"{name} {len(content)}\n".encode() + content)
        if name == ".text":
            text.update(content)
    return Code(
        checksum.hexdigest(),
        size // INSTRUCTION_BYTES,
        registers,
        spill_bytes,
        text=text.hexdigest(),
    )


def family_of(name: str) -> str:
    """Return the present name of a kernel family."""
    return RENAMED_FAMILIES.get(name, name)


def key_of(spec: dict[str, Any]) -> str:
    """Return canonical JSON of a spec, with the present name of its family."""
    named = spec | {"family": family_of(spec["family"])}
    return json.dumps(named, sort_keys=True, separators=(",", ":"))


def sample(keys: Iterable[str], count: int | None) -> list[str]:
    """Select `count` kernels of each family and architecture, the same in every tree."""
    chosen: dict[tuple[str, str], list[str]] = {}
    for key in sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest()):
        spec = json.loads(key)
        group = chosen.setdefault((spec["arch"], spec["family"]), [])
        if count is None or len(group) < count:
            group.append(key)
    return [key for group in chosen.values() for key in group]


def emit(output: Path, arguments: argparse.Namespace) -> None:
    """Build the kernels of the imported source tree, and write their digests as JSON."""
    matrix = importlib.import_module("compile_matrix")
    asked = {family_of(name) for name in arguments.family.split(",") if name}
    specs = {
        key_of(spec.to_dict()): spec
        for arch in matrix.parse_arches(arguments.arch)
        for spec in matrix.matrix(arch, full=arguments.full, short=arguments.short)
        if not asked or family_of(spec.family) in asked
    }
    build = _import_first(BUILD_MODULES).build

    def build_one(key: str) -> Code:
        try:
            built = build(specs[key])
            return code_of(built.cubin, built.metadata.registers, built.metadata.spill_bytes)
        except Exception as error:  # noqa: BLE001 - reported for its kernel
            return Code(error=f"{type(error).__name__}: {error}")

    keys = sample(specs, arguments.sample)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = dict(zip(keys, map(asdict, pool.map(build_one, keys)), strict=True))
    output.write_text(json.dumps(codes))


def _import_first(names: Sequence[str]) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(names)} is there")


def collect(tree: Path, options: Sequence[str], cache: Path) -> dict[str, Code]:
    """Build the kernels of a source tree in a subprocess.

    Raises
    ------
    RuntimeError
        The process failed.
    """
    with tempfile.TemporaryDirectory(prefix="jitattn-sass-") as folder:
        output = Path(folder) / "codes.json"
        paths = os.pathsep.join((str(tree), str(tree / "tools")))
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--emit", str(output)]
        environment = {**os.environ, "PYTHONPATH": paths, "JITATTN_CACHE_DIR": str(cache)}
        done = subprocess.run([*command, *options], cwd=tree, env=environment, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{tree}: building its kernels failed with {done.returncode}")
        return {key: Code(**code) for key, code in json.loads(output.read_text()).items()}


def compare(before: dict[str, Code], after: dict[str, Code]) -> tuple[list[str], int]:
    """Report kernels that differ, fail or are in one tree only, and count equal ones."""
    lines, equal = [], 0
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old is None or new is None:
            lines.append(f"only {'after' if old is None else 'before'}: {key}")
        elif old.error or new.error:
            lines.append(f"failed: {key}\n    before: {old}\n    after:  {new}")
        elif old.digest != new.digest:
            where = " in constants alone" if old.text == new.text else ""
            lines.append(f"differs{where}: {key}\n    before: {old}\n    after:  {new}")
        else:
            equal += 1
    return lines, equal


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two trees; return 1 unless every kernel is in both and equal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="the checkout to compare this one with")
    parser.add_argument("--after", type=Path, default=REPOSITORY, help="default: this checkout")
    parser.add_argument("--arch", default="80,90", help="80,90 or sm_80,sm_90")
    parser.add_argument("--full", action="store_true", help="every multiple of 16, dtype and mask")
    parser.add_argument("--short", action="store_true", help="one for each class of the spec")
    parser.add_argument("--family", default="", help="fwd,bwd …; default: all")
    parser.add_argument("--sample", type=int, help="so many kernels of each family and arch")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, help="keeps the kernels from run to run")
    parser.add_argument("--emit", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    options = list(sys.argv[1:] if argv is None else argv)
    if arguments.emit is not None:
        emit(arguments.emit, arguments)
        return 0
    if arguments.before is None:
        parser.error("--before is needed")
    with tempfile.TemporaryDirectory(prefix="jitattn-sass-") as folder:
        cache = (arguments.cache or Path(folder)).resolve()
        before, after = (
            collect(tree.resolve(), options, cache) for tree in (arguments.before, arguments.after)
        )
    lines, equal = compare(before, after)
    for line in lines:
        print(line)
    print(f"{equal} kernels are identical, {len(lines)} are not")
    return 1 if lines or not equal else 0


if __name__ == "__main__":
    raise SystemExit(main())
