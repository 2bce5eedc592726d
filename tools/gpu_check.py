"""Runs the GPU tests and a short benchmark on this machine, and records the results.

``python tools/gpu_check.py`` writes tests/data/gpu_record.json: GPU, driver, versions, date,
counts, timings, and a digest over the contents of jitattn/, tests/gpu, tests/support and cuda_src/
less its notes. ``--sanitize`` adds memcheck and racecheck, in parts; ``--parts`` runs some parts
and keeps the others if the digest is unchanged. ``--status`` needs no GPU: it exits 0 if the record
matches these files, else it prints the changes and exits 1.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REPOSITORY: Final = Path(__file__).resolve().parents[1]
RECORD: Final = Path("tests") / "data" / "gpu_record.json"

COVERED: Final = ("cuda_src", "jitattn", "tests/gpu", "tests/support")
LEFT_OUT: Final = ("cuda_src/notes",)
#: Parts: tools of compute-sanitizer with pytest -k expressions. The EDGE grid, the tests with
#: indirect addressing, and gradients and quantization, whose kernels exchange data through shared
#: memory. (They run without torch's allocator, so that nothing can be allocated in a capture.)
SANITIZERS: Final = {
    "memcheck-edge-fp16": ("memcheck", "(EDGE and fp16) or merge"),
    "memcheck-edge-bf16": ("memcheck", "EDGE and bf16"),
    "memcheck-edge-fp32": ("memcheck", "EDGE and fp32"),
    "memcheck-sequences": (
        "memcheck",
        "(sequences or kvcache or rotary) and not (many or graph or capture)",
    ),
    "memcheck-features": (
        "memcheck",
        "(features or dropout or units) and not (many or graph or long or capture or wgmma)",
    ),
    "memcheck-gears": (
        "memcheck",
        "((8_bits or fp16_parts_of) and not (capture or in_pages or gradients)) or "
        "(as_fp16_parts and 80)",
    ),
    "memcheck-gears-paged": ("memcheck", "8_bits_in_pages and not outside"),
    "memcheck-gradients": (
        "memcheck",
        "test_gradients.py and (random or head_dims or aligned or small_blocks) and not many",
    ),
    "memcheck-gradients-fp32": (
        "memcheck",
        "test_fp32_gradients and (head_dims or padded_keys or changed_scores)",
    ),
    "memcheck-functions": (
        "memcheck",
        "(test_captured_gradients and (float16 or beside or ragged)) or "
        "(test_function_lists and (128 or random))",
    ),
    "memcheck-wgmma": (
        "memcheck",
        "(test_wgmma.py and 64 and (features or ragged or rows_by_index or strides or terms)) or "
        "(test_wgmma_gathered and 96 and not (48 or 256) and not (packed and (2 or 4)))",
    ),
    "memcheck-wgmma-backward": (
        "memcheck",
        "test_wgmma_backward and (sequences or padded or lengths or hidden_keys or strides or "
        "(masks and bfloat16))",
    ),
    "racecheck-wgmma-backward": (
        "racecheck",
        "test_wgmma_backward and bfloat16 and masks and (Full or Causal)",
    ),
    "racecheck-wgmma": (
        "racecheck",
        # Reports the merge of splits and dropped products; not so the emulator, which knows named
        # barriers and which results are dropped (cuda_src/notes/0010).
        "test_wgmma and 128 and (features or (ragged and 3-128)) and not 256",
    ),
    "racecheck-gradients": (
        "racecheck",
        "(test_gradients.py and (head_dims or aligned or small_blocks)) or "
        "(test_8_bits and full and bfloat16 and not in_pages) or fp16_parts_of_a_block",
    ),
}
PARTS: Final = ("tests", "bench", *SANITIZERS)

#: One driver allocation per tensor, so that memcheck knows the end of each.
SANITIZER_ENVIRONMENT: Final = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZER_FOUND: Final = 99

PROBE: Final = """
import importlib.metadata, json, torch
names = ["torch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc",
         "nvidia-cuda-nvrtc-cu12"]
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
facts = {name: found[name] for name in names if name in found}
facts["torch"] = torch.__version__
facts["torch_cuda"] = str(torch.version.cuda)
try:
    from jitattn.jit import compilers
    facts["nvrtc"] = str(compilers.chosen())
except Exception as error:
    facts["nvrtc"] = f"not known: {error}"
print(json.dumps(facts))
"""


def covered_files(root: Path) -> Iterator[Path]:
    """Yield the files that the record covers, relative to `root`, sorted by path."""
    found = []
    for folder in COVERED:
        for path in (root / folder).rglob("*"):
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            left_out = relative.as_posix().startswith(tuple(f"{name}/" for name in LEFT_OUT))
            if path.is_file() and not hidden and not left_out and path.suffix != ".pyc":
                found.append(relative)
    yield from sorted(found, key=Path.as_posix)


def file_hashes(root: Path) -> dict[str, str]:
    """Return the sha256 of every covered file, with the line ends of the repository."""
    return {
        path.as_posix(): hashlib.sha256(
            (root / path).read_bytes().replace(b"\r\n", b"\n")
        ).hexdigest()
        for path in covered_files(root)
    }


def digest(hashes: dict[str, str]) -> str:
    """Return one sha256 over sorted paths and contents."""
    text = "".join(f"{path}\0{value}\n" for path, value in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def changes(recorded: dict[str, str], current: dict[str, str]) -> list[str]:
    """Return one line for each file that differs."""
    lines = []
    for path in sorted(recorded.keys() | current.keys()):
        if path not in recorded:
            lines.append(f"added    {path}")
        elif path not in current:
            lines.append(f"removed  {path}")
        elif recorded[path] != current[path]:
            lines.append(f"changed  {path}")
    return lines


def load_record(path: Path) -> dict[str, Any] | None:
    """Return the record, or None if there is no readable one."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "sha256" in record else None


def status(root: Path) -> int:
    """Report whether the record matches these files; return 0 if so."""
    record = load_record(root / RECORD)
    if record is None:
        print(f"no GPU record in {RECORD.as_posix()}: run tools/gpu_check.py on a GPU machine")
        return 1
    current = file_hashes(root)
    where = f"{record.get('gpu')}, {record.get('date')}"
    if record["sha256"] == digest(current):
        counts = record.get("tests") or "tests not run"
        print(f"the GPU record is current ({where}; {counts})")
        return 0
    print(f"the GPU record is stale ({where}); since then:")
    for line in changes(record.get("files", {}), current):
        print(f"  {line}")
    return 1


def run_tests(root: Path, extra: Sequence[str], workers: int, out: Path | None) -> dict[str, Any]:
    """Run tests/gpu, in several processes if asked, and return the counts of the report."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", *extra]
    environment = dict(os.environ)
    if workers > 1:
        # pytest-benchmark, if installed, warns about xdist, which is an error here.
        command += ["-n", str(workers), "--dist", "worksteal", "-p", "no:benchmark"]
        # References run on the CPU: the threads of all workers together must not exceed its cores.
        threads = max(1, (os.cpu_count() or 1) // workers)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(prefix="jitattn-gpu-check-") as folder:
        report, log = Path(folder) / "report.xml", (out or Path(folder)) / "tests.log"
        command.append(f"--junit-xml={report}")
        with log.open("w") as stream:
            code = subprocess.run(
                command, cwd=root, env=environment, check=False, stdout=stream, stderr=stream
            ).returncode
        if code:
            print(log.read_text()[-20000:])
        if not report.exists():
            return {"passed": 0, "failed": 0, "skipped": 0, "exit_code": code}
        return read_report(report) | {"exit_code": code}


def read_report(report: Path) -> dict[str, Any]:
    """Read counts, seconds and skip reasons of a junit report."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))

    def total(name: str) -> int:
        return sum(int(suite.get(name, "0")) for suite in suites)

    failed, skipped = total("failures") + total("errors"), total("skipped")
    reasons: dict[str, int] = {}
    for case in (element for suite in suites for element in suite.iter("skipped")):
        reason = case.get("message", "")
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "passed": total("tests") - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(sum(float(suite.get("time", "0")) for suite in suites), 1),
        "skip_reasons": reasons,
    }


def run_bench(root: Path) -> list[dict[str, str]]:
    """Run the short benchmark; return its rows without the facts that the record has already."""
    with tempfile.TemporaryDirectory(prefix="jitattn-gpu-check-") as folder:
        table = Path(folder) / "bench.csv"
        command = [sys.executable, str(root / "tools" / "bench.py"), "--quick", "--csv", str(table)]
        environment = os.environ | {"PYTHONPATH": _python_path(root)}
        code = subprocess.run(command, cwd=root, env=environment, check=False).returncode
        if not table.exists():
            return [{"error": f"bench.py --quick ended with exit code {code}, without a table"}]
        keep = ("section", "shape", "provider", "metric", "p20", "p50", "p80")
        with table.open(newline="") as file:
            return [{name: row.get(name, "") for name in keep} for row in csv.DictReader(file)]


def run_sanitizer(
    root: Path, tool: str, keyword: str, log: Path, device: str | None = None
) -> dict[str, Any]:
    """Run a sanitizer over some tests, and return its findings; `log` is written as they come.

    `device` is the only one that the tests see; None lets them see all.
    """
    pytest = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-x", "-k", keyword]
    command = ["compute-sanitizer", "--tool", tool]
    command += ["--error-exitcode", str(SANITIZER_FOUND), *pytest]
    environment = os.environ | SANITIZER_ENVIRONMENT
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    try:
        with log.open("w") as file:
            done = subprocess.run(
                command, cwd=root, env=environment, check=False, stdout=file, stderr=file
            )
    except FileNotFoundError:
        return {"error": "compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)"}
    text = log.read_text()
    print(text[-4000:])
    return {
        "tool": tool,
        "selection": keyword,
        "errors": error_count(text),
        "tests": pytest_summary(text),
        "exit_code": done.returncode,
    }


def error_count(text: str) -> int | None:
    """Return the number of errors of a sanitizer, or None if its summary is missing."""
    found = re.findall(r"(?:ERROR SUMMARY: |hazards displayed \()(\d+) error", text)
    return sum(map(int, found)) if found else None


def pytest_summary(text: str) -> str:
    """Return pytest's last line, '3 passed in 1.20s', without memcheck's summary."""
    lines = re.findall(r"^=*\s*(\d+ [a-z]+.* in [\d.]+s.*?)\s*=*$", text, flags=re.MULTILINE)
    return str(lines[-1]) if lines else "none ran"


def visible_devices() -> list[str]:
    """Return the indices or UUIDs of the CUDA devices that a child sees; none without a driver."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def machine_facts(root: Path) -> dict[str, Any]:
    """Return GPU, driver and versions; the text of an unknown fact says so."""
    facts: dict[str, Any] = {"gpu": "none found", "driver": "none found"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        facts["gpu"], facts["driver"] = (part.strip() for part in lines.splitlines()[0].split(","))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        pass
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=root,
        env=os.environ | {"PYTHONPATH": _python_path(root)},
        check=False,
        capture_output=True,
        text=True,
    )
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    if probe.returncode == 0:
        versions |= json.loads(probe.stdout.splitlines()[-1])
    else:
        versions["error"] = probe.stderr.strip().rpartition("\n")[2]
    return facts | {"versions": versions}


def _python_path(root: Path) -> str:
    return os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))


def check(root: Path, parts: Sequence[str], arguments: argparse.Namespace) -> int:
    """Run some parts, write the record, and return 0 if nothing failed."""
    hashes = file_hashes(root)
    record: dict[str, Any] = {
        "sha256": digest(hashes),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine_facts(root),
    }
    old = load_record(root / RECORD)
    kept = old if old is not None and _same_run(old, record) else {}
    record |= {part: kept.get(part) for part in PARTS} | {"files": hashes}

    devices = visible_devices()

    def device_of(part: str) -> str | None:
        """Spread the sanitizers over the devices; the tests run on the first if with them."""
        used = devices[1:] if arguments.at_once else devices
        return used[list(SANITIZERS).index(part) % len(used)] if used else None

    def run_part(part: str) -> tuple[str, Any]:
        if part == "tests":
            return part, run_tests(root, arguments.pytest_args, arguments.workers, arguments.out)
        with tempfile.TemporaryDirectory(prefix="jitattn-gpu-check-") as folder:
            log = (arguments.out or Path(folder)) / f"{part}.log"
            return part, run_sanitizer(root, *SANITIZERS[part], log, device_of(part))

    # Sanitizer runs mostly wait for references on the CPU, so they run in parallel; not beside the
    # tests, which need all cores and have compiled the kernels by now.
    groups = (("tests",), tuple(SANITIZERS))
    for at_once in ((*groups[0], *groups[1]),) if arguments.at_once else groups:
        asked = [part for part in at_once if part in parts]
        with ThreadPoolExecutor(max(1, len(asked))) as pool:
            for done in as_completed([pool.submit(run_part, part) for part in asked]):
                part, found = done.result()
                record[part] = found
                write_record(record, root, arguments.out)
    if "bench" in parts:
        record["bench"] = run_bench(root)
    write_record(record, root, arguments.out)
    bad = failures(record, parts)
    for line in bad:
        print(f"FAILED: {line}")
    return 1 if bad else 0


def write_record(record: dict[str, Any], root: Path, out: Path | None) -> None:
    """Write the results so far, so that an interrupted part loses no other."""
    for path in [root / RECORD, *([out / RECORD.name] if out else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def _same_run(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old.get(name) == new[name] for name in ("sha256", "gpu", "driver", "versions"))


def failures(record: dict[str, Any], parts: Sequence[str]) -> list[str]:
    """Return one line for each part that ran and failed."""
    lines = []
    if record["gpu"] == "none found":
        lines.append("no GPU was found: nvidia-smi does not answer")
    if "tests" in parts:
        tests = record["tests"]
        if tests["failed"] or tests["exit_code"] or not tests["passed"]:
            lines.append(f"tests/gpu: {tests}")
    if "bench" in parts and any("error" in row for row in record["bench"]):
        lines.append(f"bench: {record['bench']}")
    for part in SANITIZERS.keys() & set(parts):
        found = record[part]
        ran = "passed" in found.get("tests", "")
        if found.get("errors") != 0 or found.get("exit_code") != 0 or not ran:
            lines.append(f"{part}: {found}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check, or report whether its record is current."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--status", action="store_true", help="is the record of these files?")
    parser.add_argument("--sanitize", action="store_true", help="also all that sanitizers are for")
    parser.add_argument("--parts", default="tests,bench", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="write the record into this folder as well")
    parser.add_argument("--workers", type=int, default=1, help="processes that share tests/gpu")
    parser.add_argument("--at-once", action="store_true", help="sanitizers beside the tests")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="another checkout")
    parser.add_argument("pytest_args", nargs="*", help="after --, for pytest tests/gpu")
    arguments = parser.parse_args(argv)
    if arguments.status:
        return status(arguments.root)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in arguments.parts.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if arguments.sanitize:
        parts.extend(SANITIZERS)
    return check(arguments.root, parts, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
