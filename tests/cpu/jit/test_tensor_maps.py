"""Tests that parameter structs follow tensor maps, with addresses filled in."""

from __future__ import annotations

import struct

import pytest

from jitattn.errors import InternalError
from jitattn.jit import tensor_maps
from jitattn.jit.tensor_maps import BoxedTensor
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable

SAMPLE = BoxedTensor("bf16", (64, 100, 2, 3), (256, 128, 25600), (64, 64, 1, 1))
TABLE = ArgumentTable(
    ArgumentStruct("P", (Argument("q", "const void*"), Argument("n", "int32_t"),
                         Argument("k", "const void*")))
)  # fmt: skip


def test_maps_come_first_and_take_the_addresses() -> None:
    layout = TABLE.layout({"n": 7}, ("q", "k")).after([(1, b"K" * 120), (0, b"Q" * 120)])
    given = {0: 0x1000, 1: 0x2000}
    buffer = bytearray(layout.size)
    layout.pack_into(buffer, 0, *(given[p] if isinstance(p, int) else p for p in layout.parts))
    maps, rest = buffer[:256], buffer[256:]
    assert struct.unpack_from("=Q120sQ120s", maps) == (0x2000, b"K" * 120, 0x1000, b"Q" * 120)
    assert bytes(rest) == TABLE.pack({"q": 0x1000, "k": 0x2000, "n": 7})


class Driver:
    """Encodes a map as its address, or what `first` makes of it, and its arguments."""

    def __init__(self, first: int = 0, code: int = 0) -> None:
        self.first, self.code = first, code

    def cuTensorMapEncodeTiled(self, place, dtype, rank, address, *rest):  # type: ignore[no-untyped-def]  # noqa: N802
        import ctypes

        words = [address.value + self.first, dtype, rank, *rest[0], *rest[1][: rank - 1], *rest[2]]
        ctypes.memmove(place, struct.pack(f"={len(words)}Q", *words), 8 * len(words))
        return self.code


@pytest.fixture(autouse=True)
def _forgets() -> None:
    tensor_maps.is_available.cache_clear()
    tensor_maps.encode.cache_clear()


def test_a_map_is_encoded_for_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_maps, "_driver", Driver)
    assert tensor_maps.is_available()
    words = struct.unpack("=15Q", tensor_maps.encode(SAMPLE))
    assert words[:2] == (9, 4)
    assert words[2:13] == (64, 100, 2, 3, 256, 128, 25600, 64, 64, 1, 1)


@pytest.mark.parametrize(
    "driver", [Driver(first=1), Driver(code=1), None], ids=["layout", "refusal", "none"]
)
def test_other_drivers_have_no_maps(driver: Driver | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layout, a refusal, or no driver at all."""

    def found() -> Driver:
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(tensor_maps, "_driver", found)
    assert not tensor_maps.is_available()


def test_a_refused_map_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_maps, "_driver", lambda: Driver(code=1))
    with pytest.raises(InternalError, match="returned 1"):
        tensor_maps.encode(SAMPLE)
