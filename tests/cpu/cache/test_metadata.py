"""Tests that metadata, memo and specs are validated when read, so that later use cannot fail."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitattn.cache import memo
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import (
    MAX_JSON_BYTES,
    MAX_LOG,
    Metadata,
    cache_key,
    from_dict,
    from_json,
    sha256,
    to_json,
)
from jitattn.jit import build, compilers, layers, sources
from jitattn.jit.codegen import render
from jitattn.kernels.norm import NormSpec
from jitattn.spec.enums import Dtype
from jitattn.spec.kernel_spec import spec_from_dict
from tests.cpu.commands import run
from tests.cpu.specs import combine_spec, fake_entry, forward_spec

LONG = "9" * 5000
NAN, INF = float("nan"), float("inf")
#: (field, value) that no entry of ours has.
STRANGE: list[tuple[str, Any]] = [
    *(("toolchain", f"nvrtc {text}") for text in (LONG, "", "x", "١٢.٩.٨٦", "13.0\n", "1.2.3.4.5")),
    *(
        ("toolchain", text)
        for text in ("", "\ud800", "\x1b[31mnvrtc 13.0.88", "nvrtc\n13.0.88", 13)
    ),
    *(("arch", text) for text in ("sm_٨٠", "sm_8", "sm_080", "sm_80\n", "sm_80x", "SM_80", 80)),
    *(("key", text) for text in ("", "a" * 63, "A" * 64, "٣" * 64, "a" * 64 + "\n")),
    *(("sha256", text) for text in ("", "g" * 64, "\ud800" * 64)),
    *(("source_digest", text) for text in ("\ud800", "../..", "A", 7)),
    *(("header_digest", text) for text in ("\ud800", "x" * 65)),
    *(("compile_ms", number) for number in (NAN, INF, -INF, -1.0, 1, "1.0", None)),
    *(("registers", number) for number in (NAN, -1, 2**31, 10**400, 1.0, True, "32")),
    *(("smem_bytes", number) for number in (-1, 2**63, False)),
    *(("bytes", number) for number in (-1, 2**40, 4096.0)),
    *(("options", value) for value in ("-a", [1], ["\ud800"], ["a b"], ["-\x1b"], ["-a"] * 65)),
    *(("log", text) for text in ("\ud800", "x" * (MAX_LOG + 1), 7, None)),
    *(("spec", value) for value in ([], "x", {"\ud800": 1}, {"a": "\ud800"}, {"a\n": 1})),
    *(("spec", {"family": "combine", "arch": value}) for value in ("sm_80\x1b", 10**30, None, NAN)),
    ("spec", {f"a{number}": number for number in range(300)}),
]


def raw_metadata() -> dict[str, Any]:
    return json.loads(to_json(fake_entry(1).metadata))


@pytest.mark.parametrize(("field", "value"), STRANGE, ids=lambda value: str(value)[:24])
def test_strange_values_are_damage(field: str, value: object) -> None:
    raw = raw_metadata()
    assert from_dict(raw) == fake_entry(1).metadata
    raw[field] = value
    assert from_dict(raw) is None
    del raw[field]
    assert from_dict(raw) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([field.name for field in fields(Metadata)]),
    _JSON | st.text(st.characters(categories=["Nd", "Cs", "Cc", "Ll"]), max_size=70),
)
def test_what_passes_can_be_used(field: str, value: object) -> None:
    text = json.dumps({**raw_metadata(), field: value}).encode()
    metadata = from_json(text)
    if metadata is None:
        return
    assert from_json(to_json(metadata)) == metadata
    assert len(metadata.key_again()) == 64
    assert isinstance(compilers.is_loadable(metadata.toolchain), bool)
    for shown in (metadata.toolchain, metadata.arch, *metadata.options, *metadata.spec):
        assert shown.isprintable()
        assert shown.isascii()


def test_longest_log_fits() -> None:
    raw = {**raw_metadata(), "log": "\U0001f600" * MAX_LOG}
    metadata = from_dict(raw)
    assert metadata is not None
    assert len(to_json(metadata)) < MAX_JSON_BYTES


def write(disk: DiskCache, raw: dict[str, Any], key: str) -> None:
    """Put an entry into a cache, whatever it says."""
    disk.write(fake_entry(0))
    cubin_path, json_path = disk.paths(key)
    cubin_path.parent.mkdir(mode=0o700, exist_ok=True)
    for path, content in (
        (cubin_path, fake_entry(1).cubin),
        (json_path, json.dumps(raw).encode()),
    ):
        path.write_bytes(content)
        path.chmod(0o600)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("toolchain", f"nvrtc {LONG}"),
        ("toolchain", "\ud800"),
        ("compile_ms", NAN),
        ("spec", {**combine_spec().to_dict(), "head_dim_v": "\ud800"}),
        ("arch", "sm_٨٠"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_every_command_lives_with_a_strange_entry(
    cache_dir: Path, tmp_path: Path, field: str, value: object
) -> None:
    disk, raw = DiskCache(cache_dir), {**raw_metadata(), field: value}
    write(disk, raw, raw["key"])
    for command in (
        ["list"], ["list", "--json"], ["stats"], ["show", raw["key"]], ["verify"],
        ["export", str(tmp_path / "a.zip")], ["prebuild", "--arch", "80", "--dry-run"],
        ["prune", "--stale", "--other-toolchains", "--older-than", "1d", "-y"],
        ["clear", "--arch", "86", "-y"], ["clear", "-y"],
    ):  # fmt: skip
        done = run(*command)
        assert done.exit_code in (0, 1), done.output
        assert isinstance(done.exception, SystemExit | None), done.exception
    assert disk.keys() == []


@pytest.mark.parametrize(
    "change",
    [{"groups": 0}, {"head_dim": 0}, {"head_dim": 10**9}, {"groups": 128}, {"groups": 48}],
    ids=str,
)
def test_commands_live_with_a_spec_that_no_kernel_has(
    cache_dir: Path, change: dict[str, int]
) -> None:
    spec = {**NORM.to_dict(), **change}
    raw = {**raw_metadata(), "spec": spec}
    raw["key"] = key = cache_key(
        spec, raw["source_digest"], "", tuple(raw["options"]), raw["toolchain"]
    )
    disk = DiskCache(cache_dir)
    write(disk, raw, key)
    assert json.loads(run("show", key, "--json").stdout)["command"] is None
    assert run("verify", "--recompile").exit_code == 0
    assert key in json.loads(run("prune", "--stale", "-y", "--json").stdout)["kernels"]
    with pytest.raises(ValueError, match=next(iter(change))):
        spec_from_dict(spec)


def test_verify_passes_over_what_no_compiler_knows(cache_dir: Path) -> None:
    """The key is right, so the spec is compiled again, for an architecture that is not there."""
    here = build.build(combine_spec()).metadata
    spec = combine_spec("sm_199")
    one = build._identify(spec, compilers.chosen())
    raw = {**json.loads(to_json(here)), "spec": spec.to_dict(), "arch": spec.arch, "key": one.key}
    raw |= {"header_digest": one.header_digest, "options": list(one.options)}
    cubin = bytearray(fake_entry(1).cubin)
    cubin[48] = 199
    disk = DiskCache(cache_dir)
    write(disk, {**raw, "sha256": sha256(cubin), "bytes": len(cubin)}, one.key)
    disk.paths(one.key)[0].write_bytes(cubin)
    done = run("verify", "--recompile", "--json")
    assert done.exit_code == 0, done.output
    counts = json.loads(done.stdout)
    assert (counts["checked"], counts["recompiled"], counts["not_comparable"]) == (3, 1, 2)


NORM = NormSpec(dtype=Dtype.FP16, head_dim=64, groups=1, access="vec16", arch="sm_80")


@pytest.mark.parametrize("toolchain", [f"nvrtc {LONG}", "nvrtc ٩٩.٩", "\ud800"])
def test_kernel_is_not_lost_for_ever(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: str
) -> None:
    """An entry of a strange compiler, in the cache and in a directory that is only read."""
    good = build.build(combine_spec())
    build.clear_memory()
    other = tmp_path / "layer"
    for root, key in ((other, good.key[:40] + "0" * 24), (cache_dir, good.key)):
        raw = {**json.loads(to_json(good.metadata)), "toolchain": toolchain, "key": key}
        write(DiskCache(root), raw, key)
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(other))
    assert build.build(combine_spec()).origin == "compiled"
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"
    assert layers.find(good.key, "sm_80", None) is None


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 0}, {"head_dim": 257}, {"block_q": 0}, {"warps_q": -1}, {"stages": 10**9},
        {"arch": "sm_x"}, {"arch": "sm_٨٠"}, {"arch": "80"}, {"arch": "sm_"}, {"dtype": "\ud800"},
    ],
    ids=str,
)  # fmt: skip
def test_spec_that_no_kernel_has_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"spec|is not a valid"):
        spec_from_dict({**forward_spec().to_dict(), **change})


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([forward_spec(), combine_spec(), NORM]),
    st.data(),
)
def test_spec_that_is_accepted_can_be_rendered(spec: Any, data: st.DataObject) -> None:
    flat = spec.to_dict()
    name = data.draw(st.sampled_from(list(flat)))
    flat[name] = data.draw(_JSON | st.integers(-2, 300) | st.sampled_from(["sm_90a", "on", "fp32"]))
    try:
        made = spec_from_dict(flat)
    except ValueError:
        return
    assert "struct Spec" in render(made)
    assert made.to_dict() == flat


FACT = [["/x", 1, 2, 3, 4]], "a" * 64
MEMOS = [
    [], None, 7, "x", {"n": 7}, {"n": []}, {"n": [[], "a", "b"]}, {"n": [7, "a"]},
    {"n": [[7], "a"]}, {"n": [[[]], "a"]}, {"n": [[[7]], "a"]},
    {"n": [[["/x", "1", 2, 3, 4]], "a"]},
    {"n": [[["\0"]], "a" * 64]}, {"n": [[["/x\ud800"]], "a" * 64]}, {"n": [[["/x", 1]], "a"]},
    {"n": [[{"0": "/x"}], "a"]}, {"n": {"0": [], "1": "a"}}, {"n": [[["/x", NAN, 2, 3, 4]], "a"]},
    {"n": [[["/x"]], "\ud800"]}, {"n": [[["/x"]], "short"]}, {"n": [[["/x"]], {"a": 1}]},
    {"n": [[["/x"]], [["12", "libnvrtc.so", []]]]}, {"n": [[["/x"]], [[[True], "x", []]]]},
    {"n": [[["/x"]], [[[12, 10**9], "x", []]]]}, {"n": [[["/x"]], [[[12, 9], "x", [7]]]]},
]  # fmt: skip


@pytest.mark.parametrize("content", MEMOS, ids=str)
def test_memo_of_another_shape_is_passed_over(cache_dir: Path, content: object) -> None:
    expected = sources.closure("combine").digest
    memo.remember("other", [], 1)  # makes the file
    names = f"templates of merge in {sources.locate()}", f"nvrtc in {compilers.sys.prefix}"
    if isinstance(content, dict):
        content = dict.fromkeys(names, content["n"])
    (cache_dir / "v1" / "memo.json").write_text(json.dumps(content))
    memo._loaded.clear()
    sources.digest.cache_clear()
    assert sources.digest("combine") == expected
    assert compilers._remembered() == compilers.installed()
    memo.remember("one more", *FACT)  # what was not of this shape is not kept
    memo._loaded.clear()
    assert memo.recall("one more") == FACT
