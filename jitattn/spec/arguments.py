"""Argument tables: one declaration of a kernel's parameter struct for host and device.

A kernel takes one struct by value. Its table declares each field once, with C++ type and meaning.
The C++ struct of the generated header is rendered from it, and a launch packs named values with it.
8-byte fields precede 4-byte fields, whatever the order of declaration, so that neither side pads
between fields; the end is padded to a multiple of 8 bytes. A struct may extend another, as in C++.

Meanings are not rendered: rewording one does not change the kernel.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, get_type_hints

from jitattn.errors import InternalError, LaunchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Format letters of the module `struct`; a pointer is "Q".
_CODES: Final = {"int64_t": "q", "int32_t": "i", "uint32_t": "I", "float": "f"}
_BYTES: Final = {"Q": 8, "q": 8, "i": 4, "I": 4, "f": 4}
#: Largest parameter struct that every driver accepts, in bytes.
MAX_BYTES: Final = 4096


class Argument(NamedTuple):
    """Field of a parameter struct."""

    name: str
    type: str  #: C++ type: a pointer, int64_t, int32_t, uint32_t or float
    meaning: str = ""

    @property
    def is_address(self) -> bool:
        """Whether the field is a pointer."""
        return self.type.endswith("*")

    @property
    def code(self) -> str:
        """Format letter of `struct`."""
        return "Q" if self.is_address else _CODES[self.type]


def strides(tensor: str, *dimensions: str) -> tuple[Argument, ...]:
    """Return the fields for the strides of a tensor, in elements."""
    return tuple(Argument(f"{tensor}_stride_{one}", "int64_t") for one in dimensions)


@dataclass(frozen=True, slots=True)
class ArgumentStruct:
    """Struct of the generated header; a base named `Base` makes it a template."""

    name: str
    fields: tuple[Argument, ...]  #: in any order
    base: str = ""

    @property
    def in_order(self) -> tuple[Argument, ...]:
        """Fields in memory order: 8-byte fields first, otherwise as declared."""
        return tuple(sorted(self.fields, key=lambda field: -_BYTES[field.code]))

    @property
    def format(self) -> str:
        """Format string of the module `struct`, with the padding at the end."""
        codes = "".join(field.code for field in self.in_order)
        return codes + "4x" * (sum(_BYTES[code] for code in codes) // 4 % 2)

    def render(self) -> list[str]:
        """Return the lines of the C++ struct."""
        template = ["template <class Base>"] if "Base" in self.base else []
        head = f"struct {self.name} : {self.base} {{" if self.base else f"struct {self.name} {{"
        return [*template, head, *(f"  {one.type} {one.name};" for one in self.in_order), "};"]


def struct_of(name: str, values: type, *more: Argument, base: str = "") -> ArgumentStruct:
    """Return the struct whose fields are those of a named tuple, and further ones.

    Parameters
    ----------
    values : type
        A named tuple. A field's annotation holds its C++ type, and may hold its meaning:
        ``Annotated[int, "int32_t", "number of rows"]``.

    Raises
    ------
    InternalError
        A field's annotation has no C++ type.
    """
    found = []
    for field, hint in get_type_hints(values, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        if not notes:
            raise InternalError(f"{values.__name__}.{field} has no C++ type")
        found.append(Argument(field, *notes))
    return ArgumentStruct(name, (*found, *more), base)


class ArgumentTable:
    """Arguments of a kernel: a struct and all its bases, from the root."""

    def __init__(self, *structs: ArgumentStruct) -> None:
        self.structs: Final = structs
        self.fields: Final = tuple(field for one in structs for field in one.in_order)
        self.names: Final = tuple(field.name for field in self.fields)
        self._struct: Final = struct.Struct("=" + "".join(one.format for one in structs))
        self.size: Final = self._struct.size
        self._take: Final = operator.itemgetter(*self.names)
        self._offsets: Final = _offsets(structs)
        repeated = _repeated(self.names)
        if repeated or self.size > MAX_BYTES:
            raise InternalError(f"{self.name} has {self.size} bytes, and {repeated} twice")

    @property
    def name(self) -> str:
        """Name of the last struct."""
        return self.structs[-1].name

    def extended(self, *structs: ArgumentStruct) -> ArgumentTable:
        """Return the table of a struct that extends this one."""
        return ArgumentTable(*self.structs, *structs)

    def pack(self, named: Mapping[str, float]) -> bytes:
        """Return all arguments as bytes.

        Raises
        ------
        LaunchError
            An argument is missing or unknown.
        """
        if len(named) != len(self.names):
            self._check(tuple(named))
        try:
            values = self._take(named)
        except KeyError:
            self._check(tuple(named))
            raise
        return self._struct.pack(*values)

    def layout(self, constant: Mapping[str, float], varying: Sequence[str]) -> Layout:
        """Pack the constant arguments, and locate those that change from call to call.

        Raises
        ------
        LaunchError
            An argument is missing, unknown or given twice.
        """
        self._check((*constant, *varying))
        packed = self.pack({**dict.fromkeys(varying, 0), **constant})
        codes, end = "=", 0
        parts: list[int | bytes] = []
        for offset, code, place in sorted(
            (*self._offsets[name], place) for place, name in enumerate(varying)
        ):
            if offset > end:
                codes += f"{offset - end}s"
                parts.append(packed[end:offset])
            codes += code
            parts.append(place)
            end = offset + _BYTES[code]
        if end < len(packed):
            codes += f"{len(packed) - end}s"
            parts.append(packed[end:])
        return Layout(len(packed), struct.Struct(codes).pack_into, tuple(parts), codes)

    def offsets(self) -> dict[str, tuple[int, str]]:
        """Return offset in bytes and format letter of every argument."""
        return self._offsets

    def _check(self, given: tuple[str, ...]) -> None:
        missing, unknown = set(self.names) - set(given), set(given) - set(self.names)
        doubled = _repeated(given)
        if missing or unknown or doubled:
            raise LaunchError(
                f"arguments of {self.name}: missing {sorted(missing)}, unknown {sorted(unknown)}, "
                f"given twice {doubled}; this is a fault of jitattn, please report it"
            )


class Layout(NamedTuple):
    """Parameter struct with constant fields filled in, and the places of the others."""

    size: int
    #: Of `struct`: writes a value for each of `parts` into a buffer.
    pack_into: Callable[..., None]
    #: The struct from its begin: constant bytes, or the place of a varying argument among them.
    parts: tuple[int | bytes, ...]
    #: Format of the module `struct`.
    codes: str

    def after(self, records: Sequence[tuple[int, bytes]]) -> Layout:
        """Return the layout of records and this struct after them.

        A record begins with an address: it is the place of a varying argument, and bytes.
        """
        codes = "=" + "".join(f"Q{len(rest)}s" for _, rest in records) + self.codes[1:]
        parts = (part for record in records for part in record)
        packed = struct.Struct(codes)
        return Layout(packed.size, packed.pack_into, (*parts, *self.parts), codes)


def _offsets(structs: Sequence[ArgumentStruct]) -> dict[str, tuple[int, str]]:
    """Return offset in bytes and format letter of every argument."""
    found: dict[str, tuple[int, str]] = {}
    begin = 0
    for one in structs:
        offset = begin
        for field in one.in_order:
            found[field.name] = offset, field.code
            offset += _BYTES[field.code]
        begin += struct.calcsize("=" + one.format)
    return found


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


#: Left bound of a window without one.
NO_LEFT: Final = -(2**30)


@functools.cache
def divisor(number: int) -> tuple[int, int]:
    """Return `fast_divisor`, memoized."""
    return fast_divisor(number)


def signed_divisor(number: int) -> tuple[int, int]:
    """Return `fast_divisor` of the magnitude of an int32; for 0, what makes all quotients 0."""
    return divisor(abs(number)) if number else (0, 31)


def fast_divisor(divisor: int) -> tuple[int, int]:
    """Return mul, shift: n // divisor == (mulhi(n, mul) + n) >> shift for 0 <= n <= 2**31.

    Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    shift = (divisor - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift
