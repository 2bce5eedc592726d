"""The parameter structs agree with the header that the kernels read."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from jitattn.jit.sources import locate
from jitattn.spec import params

_CODES = {"int64_t": "q", "int32_t": "i", "uint32_t": "I", "float": "f"}


def header_fields(struct: str) -> list[tuple[str, str]]:
    text = (locate() / "jitattn" / "params.cuh").read_text()
    found = re.search(rf"struct {struct}(?: : (\w+))? \{{(.*?)\n\}};", text, flags=re.DOTALL)
    assert found is not None
    base, body = found.groups()
    found = header_fields(base) if base else []
    for line in body.splitlines():
        declaration = line.partition("//")[0].strip()
        if not declaration:
            continue
        kind, name = re.fullmatch(r"((?:const )?\w+\*?) (\w+);", declaration).groups()
        found.append((name, "Q" if kind.endswith("*") else _CODES[kind]))
    return found


STRUCTS = {
    "fwd": "FwdParams",
    "fwd_seq": "FwdSeqParams",
    "fwd_score": "FwdScoreParams",
    "fwd_list": "FwdListParams",
    "merge": "MergeParams",
    "append": "AppendParams",
    "rotary": "RotaryParams",
    "norm": "NormParams",
}


@pytest.mark.parametrize(("family", "struct"), STRUCTS.items())
def test_fields_match_the_header(family: str, struct: str) -> None:
    assert header_fields(struct) == list(params.FIELDS[family])


@pytest.mark.parametrize("family", STRUCTS)
def test_neither_side_pads(family: str) -> None:
    codes = [code for _, code in params.FIELDS[family]]
    sizes = [8 if code in "Qq" else 4 for code in codes]
    offsets = list(itertools.accumulate(sizes, initial=0))
    assert all(offset % size == 0 for offset, size in zip(offsets[:-1], sizes, strict=True))
    assert params.STRUCTS[family].size == sum(sizes)
    assert sum(sizes) % 8 == 0


def test_fast_divisor_is_exact() -> None:
    draw = random.Random(3)
    divisors = [1, 2, 3, 5, 7, 8, 31, 64, 127, 1000, 2**30, 2**31 - 1]
    for divisor in divisors:
        mul, shift = params.fast_divisor(divisor)
        assert 0 < mul < 2**32
        edges = [0, 1, divisor - 1, divisor, divisor + 1, 2 * divisor - 1, 2**31 - 1]
        for n in [*edges, *(draw.randrange(2**31) for _ in range(200))]:
            if n < 2**31:
                assert (((n * mul) >> 32) + n) >> shift == n // divisor
                assert ((n * mul) >> 32) + n < 2**32  # the sum must not wrap in 32 bits
