"""Read the key-value header of a GGUF file.

The `gguf` package builds one numpy view per array element, which takes 1.7 s on a 49k
vocabulary (measured, DEPENDENCIES.md section 8); this reader takes the strings in one pass.
"""

import mmap
import struct
from pathlib import Path
from typing import TypeAlias

from headrace.errors import ConfigError

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list[Scalar]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Type numbers are those of the GGUF specification.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {number: struct.Struct("<" + code) for number, code in _FORMATS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class _Cursor:
    """Owns a position in a mapped file; every read is checked against its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def take(self, num_bytes: int) -> bytes:
        start, self._at = self._at, self._at + num_bytes
        if num_bytes < 0 or self._at > len(self._data):
            raise ValueError(f"needs {num_bytes} bytes at {start}, file has {len(self._data)}")
        return self._data[start : self._at]

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def text(self) -> str:
        return self.take(self.u64()).decode()

    def value(self) -> Value:
        number = self.u32()
        return self._array() if number == _ARRAY else self._scalars(number, 1)[0]

    def _array(self) -> list[Scalar]:
        number, count = self.u32(), self.u64()
        return self._scalars(number, count)

    def _scalars(self, number: int, count: int) -> list[Scalar]:
        if count > len(self._data):
            raise ValueError(f"array of {count} elements in a file of {len(self._data)} bytes")
        if number == _STRING:
            return [self.text() for _ in range(count)]
        if number not in _SCALARS:
            raise ValueError(f"unknown value type {number}")
        scalar = _SCALARS[number]
        return [found for (found,) in scalar.iter_unpack(self.take(scalar.size * count))]


def read_header(path: Path) -> dict[str, Value]:
    """Return all key-value pairs of a little-endian GGUF file, without its tensors.

    Raises:
        ConfigError: the file is missing, not GGUF, of another version, or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path.name} as a GGUF file: {error}", field="model") from error


def _parse(cursor: _Cursor) -> dict[str, Value]:
    if cursor.take(4) != _MAGIC:
        raise ValueError("it does not start with GGUF")
    version = cursor.u32()
    if version not in _VERSIONS:
        raise ValueError(f"version is {version}, supported are {_VERSIONS}")
    cursor.u64()
    return {cursor.text(): cursor.value() for _ in range(cursor.u64())}
