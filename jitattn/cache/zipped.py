"""Reads and writes uncompressed zip files, and validates every field that it reads.

The standard library's reader builds an object for each of any number of members, allocates the
sizes that a file declares, and raises errors of many kinds on damaged files. An archive of kernels
needs little of the format: stored members one after another, then the directory, then its end
record, and nothing else. Everything that `Members` does not expect is a `ValueError`.
"""

from __future__ import annotations

import stat
import struct
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_LOCAL_MARK: Final = b"PK\x03\x04"
_CENTRAL_MARK: Final = b"PK\x01\x02"
_END_MARK: Final = b"PK\x05\x06"
_VERSION: Final = 20  # of the format; the one for stored members
_POSIX: Final = 3 << 8  # system that defines the attributes, on Windows too
_DATE: Final = (1 << 5) | 1  # 1980-01-01
_MODE: Final = (stat.S_IFREG | 0o600) << 16
_UTF8_NAME: Final = 1 << 11
_MAX_NAME: Final = 255
#: The largest file and number of members that need no 64-bit extension.
MAX_BYTES: Final = 0xFFFFFFFE
MAX_MEMBERS: Final = 0xFFFE


def chunks(members: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield a zip file piece by piece.

    Raises
    ------
    ValueError
        It grows beyond `MAX_BYTES` or `MAX_MEMBERS`.
    """
    directory: list[bytes] = []
    offset = 0
    for name, content in members:
        encoded, size = name.encode(), len(content)
        facts = (0, 0, 0, _DATE, zlib.crc32(content), size, size, len(encoded), 0)
        if size > MAX_BYTES or offset + size > MAX_BYTES or len(directory) >= MAX_MEMBERS:
            raise ValueError(f"it is too large: more than {MAX_BYTES} bytes or {MAX_MEMBERS} files")
        head = _LOCAL.pack(_LOCAL_MARK, _VERSION, *facts) + encoded
        attributes = (0, 0, 0, _MODE, offset)
        directory.append(
            _CENTRAL.pack(_CENTRAL_MARK, _VERSION | _POSIX, _VERSION, *facts, *attributes) + encoded
        )
        yield head
        yield content
        offset += len(head) + size
    size = sum(map(len, directory))
    if offset + size > MAX_BYTES:
        raise ValueError(f"it is too large: more than {MAX_BYTES} bytes")
    yield from directory
    yield _END.pack(_END_MARK, 0, 0, len(directory), len(directory), size, offset, 0)


@dataclass(frozen=True, slots=True)
class _Member:
    start: int  #: of its content in the file
    size: int
    crc: int


class Members:
    """Members of an open zip file; the constructor checks everything but the contents.

    Parameters
    ----------
    file : binary file
        May not change while this is used.
    max_members : int

    Raises
    ------
    ValueError
        The file is damaged, or uses other parts of the format.
    """

    def __init__(self, file: IO[bytes], max_members: int) -> None:
        self._file = file
        self._members: dict[str, _Member] = {}
        size = file.seek(0, 2)
        if size < _END.size:
            raise ValueError("it is no zip file")
        end = _END.unpack(self._bytes(size - _END.size, _END.size))
        mark, disk, start_disk, count, total, directory_size, directory_start, comment = end
        if mark != _END_MARK:
            raise ValueError("it is no zip file, or something follows its end")
        if disk or start_disk or comment or count != total or count > max_members:
            raise ValueError(f"it has a comment, several parts or more than {max_members} members")
        if directory_start + directory_size != size - _END.size:
            raise ValueError("its directory is not where it should be")
        if directory_size > count * (_CENTRAL.size + _MAX_NAME):
            raise ValueError("its directory is damaged")
        directory = memoryview(self._bytes(directory_start, directory_size))
        offset = 0  # members follow each other without overlap
        for _ in range(count):
            directory, offset = self._add(directory, offset)
        if directory or offset != directory_start:
            raise ValueError("there is something between its members, or after them")

    def sizes(self) -> dict[str, int]:
        """Return names and sizes, in file order."""
        return {name: member.size for name, member in self._members.items()}

    def read(self, name: str) -> bytes:
        """Read a member.

        Raises
        ------
        ValueError
            Its checksum is wrong.
        """
        member = self._members[name]
        content = self._bytes(member.start, member.size)
        if zlib.crc32(content) != member.crc:
            raise ValueError(f"{name!r} is damaged")
        return content

    def _add(self, directory: memoryview, offset: int) -> tuple[memoryview, int]:
        """Add the next member; return the rest of the directory and the end of the member."""
        if len(directory) < _CENTRAL.size:
            raise ValueError("its directory is damaged")
        (
            mark, _, _, flags, method, _, _, crc, stored, size, name_size, extra, comment,
            disk, _, attributes, start,
        ) = _CENTRAL.unpack(directory[: _CENTRAL.size])  # fmt: skip
        end = _CENTRAL.size + name_size
        encoded = bytes(directory[_CENTRAL.size : end])
        if mark != _CENTRAL_MARK or len(encoded) != name_size or extra or comment or disk:
            raise ValueError("its directory is damaged, or has more than such an archive needs")
        name = encoded.decode("utf-8", "backslashreplace")
        if name in self._members:
            raise ValueError(f"{name!r} occurs twice")
        if stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG):
            raise ValueError(f"{name!r} is no plain file")
        if method or flags & ~_UTF8_NAME:
            raise ValueError(f"{name!r} is compressed or encrypted")
        if stored != size:
            raise ValueError(f"{name!r} declares two sizes, {stored} and {size}")
        if start != offset:
            raise ValueError(f"{name!r} is not where it should be")
        head = self._bytes(offset, _LOCAL.size + name_size)
        local = _LOCAL.unpack(head[: _LOCAL.size])
        expected = (_LOCAL_MARK, flags, method, crc, size, size, name_size, 0)
        if (local[0], *local[2:4], *local[6:]) != expected or head[_LOCAL.size :] != encoded:
            raise ValueError(f"{name!r} declares one thing before its content and another after")
        self._members[name] = _Member(offset + len(head), size, crc)
        return directory[end:], offset + len(head) + size

    def _bytes(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        content = self._file.read(size)
        if len(content) != size:
            raise ValueError("it ends too early")
        return content
