"""How blocks lie on disk: one file of headers, one file of payloads, one slot number for both.

A folder holds three files. `lock` is held by the process that uses the folder. `headers` starts with the name
of the format; slot `i` has its header in sector `i + 1`: what block it holds, the checksum of its payload, and
a checksum of its own that also depends on the format and on `i`. `payloads` is sparse; slot `i` starts at a
multiple of 4096, so that transfers can bypass the page cache, which would only hold again what DRAM holds.

A slot's old header is cleared, then its payload is written, then its new header. Nothing is flushed: when the
machine loses its last writes, whichever they are, a header without its payload fails the payload's checksum.
"""

import errno
import fcntl
import logging
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from headrace.errors import ConfigError
from headrace.kvstore.disk_header import SECTOR_BYTES, Header, HeaderForm, format_sector
from headrace.kvstore.stored_block import StoredBlock

logger = logging.getLogger(__name__)

ALIGN_BYTES = 4096
"""Of addresses, offsets and lengths that bypass the page cache."""
SCAN_SECTORS = 2048


class SystemCalls(Protocol):
    """What touches blocks on disk; the module `os`, or a disk that fails."""

    def pwrite(self, fd: int, data: memoryview, offset: int, /) -> int:
        """Write some bytes; return how many."""
        ...

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, /) -> int:
        """Read some bytes; return how many."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a folder still holds.

    Attributes:
        headers: By slot.
        num_torn: Slots whose header is no whole one.
        num_io_errors: Reads of headers that failed; the slots they were of count as empty.
    """

    headers: dict[int, Header]
    num_torn: int
    num_io_errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpace:
    """A folder and what it is for.

    Attributes:
        folder: Used by one process at a time; made if it is missing.
        block_bytes: Of one block's payload.
        capacity_bytes: Most bytes of payloads and headers.
        format_id: Names model and layout: blocks of another format found in the folder are dropped.

    Raises:
        ConfigError: there is not room for one block.
    """

    folder: Path
    block_bytes: int
    capacity_bytes: int
    format_id: bytes

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ConfigError(
                f"{self.capacity_bytes} bytes of disk hold no block of {self.block_bytes} bytes: give more, or none",
                field="disk_bytes",
            )

    @property
    def slot_bytes(self) -> int:
        """Distance between payloads."""
        return -(-self.block_bytes // ALIGN_BYTES) * ALIGN_BYTES

    @property
    def num_slots(self) -> int:
        """How many blocks fit."""
        return (self.capacity_bytes - SECTOR_BYTES) // (self.slot_bytes + SECTOR_BYTES)


class DiskFile:
    """The slots of one folder. Every method may block: call them on a thread.

    Args:
        space: Where, and how much.
        calls: Reads and writes of blocks go through these.
    """

    def __init__(self, space: DiskSpace, calls: SystemCalls) -> None:
        self._space = space
        self._calls = calls
        self._fds: list[int] = []
        self._headers = self._payloads = -1
        self._direct: int | None = None
        self._format = format_sector(space.block_bytes, space.format_id)
        self._form = HeaderForm(self._format)

    def open(self) -> None:
        """Take the folder's lock, and drop what it holds of another format.

        Raises:
            ConfigError: another process uses the folder, or it cannot be used at all.
        """
        try:
            self._lock()
            self._headers = self._open_fd("headers", 0)
            self._payloads = self._open_fd("payloads", 0)
            self._size_files()
            self._direct = self._open_direct()
        except OSError as error:
            self.close()
            folder = self._space.folder
            raise ConfigError(f"the folder {folder} cannot hold blocks: {error}", field="disk_dir") from None
        except ConfigError:
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """Whether aligned transfers bypass the page cache."""
        return self._direct is not None

    def scan(self) -> Scan:
        """Read all headers; payloads are only looked at when they are read."""
        headers: dict[int, Header] = {}
        num_torn = num_io_errors = 0
        for first in range(0, self._space.num_slots, SCAN_SECTORS):
            sectors = np.zeros((min(SCAN_SECTORS, self._space.num_slots - first), SECTOR_BYTES), dtype=np.uint8)
            try:
                self._read(self._headers, sectors.data.cast("B"), _header_offset(first))
            except OSError as error:
                num_io_errors += 1
                logger.warning("headers cannot be read", extra={"slot": first, "error": str(error)})
                continue
            for index in np.flatnonzero(sectors.any(axis=1)).tolist():
                header = self._form.decode(first + index, sectors[index].tobytes())
                if header is None:
                    num_torn += 1
                else:
                    headers[first + index] = header
        return Scan(headers=headers, num_torn=num_torn, num_io_errors=num_io_errors)

    def write(self, slot: int, block: StoredBlock, payload: memoryview) -> bytes:
        """Fill a slot; return the payload's checksum. A reader must not be in the slot.

        Raises:
            OSError: of any step; the slot then holds no block.
        """
        self.clear(slot)
        checksum: bytes = xxhash.xxh3_128_digest(payload)
        self._write(self._fd_for(payload), payload, self._payload_offset(slot))
        header = self._form.encode(slot, Header(block=block, checksum=checksum))
        self._write(self._headers, memoryview(header), _header_offset(slot))
        return checksum

    def read(self, slot: int, checksum: bytes, into: memoryview) -> bool:
        """Read a slot's payload and return whether its checksum is the given one; if not, `into` is garbage.

        Raises:
            OSError: the disk cannot read it.
        """
        num_read = self._read(self._fd_for(into), into, self._payload_offset(slot))
        return num_read == len(into) and xxhash.xxh3_128_digest(into) == checksum

    def clear(self, slot: int) -> None:
        """Make a slot's block unknown after a restart.

        Raises:
            OSError: the disk cannot write it.
        """
        self._write(self._headers, memoryview(bytes(SECTOR_BYTES)), _header_offset(slot))

    def close(self) -> None:
        """Let the files and the lock go."""
        while self._fds:
            os.close(self._fds.pop())

    def _lock(self) -> None:
        self._space.folder.mkdir(parents=True, exist_ok=True)
        try:
            fcntl.flock(self._open_fd("lock", 0), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process keeps its blocks in {self._space.folder}: give each kvstore a folder of its own",
                field="disk_dir",
            ) from None

    def _open_fd(self, name: str, flags: int) -> int:
        fd = os.open(self._space.folder / name, os.O_RDWR | os.O_CREAT | flags, 0o600)
        self._fds.append(fd)
        return fd

    def _size_files(self) -> None:
        if os.pread(self._headers, SECTOR_BYTES, 0) != self._format:
            # On disk before the new name is: headers of another format must not come back under it.
            for fd in (self._headers, self._payloads):
                os.ftruncate(fd, 0)
                os.fsync(fd)
            os.pwrite(self._headers, self._format, 0)
        os.ftruncate(self._headers, _header_offset(self._space.num_slots))
        os.ftruncate(self._payloads, self._payload_offset(self._space.num_slots))

    def _open_direct(self) -> int | None:
        if self._space.block_bytes % ALIGN_BYTES:
            return None
        try:
            fd = self._open_fd("payloads", os.O_DIRECT)
            # Some file systems refuse only when they are used.
            with mmap.mmap(-1, ALIGN_BYTES) as page:
                os.preadv(fd, [page], 0)
        except OSError as error:
            logger.info("the page cache cannot be bypassed", extra={"error": str(error)})
            return None
        return fd

    def _fd_for(self, memory: memoryview) -> int:
        is_aligned = np.frombuffer(memory, dtype=np.uint8).ctypes.data % ALIGN_BYTES == 0
        return self._direct if is_aligned and self._direct is not None else self._payloads

    def _payload_offset(self, slot: int) -> int:
        return slot * self._space.slot_bytes

    def _write(self, fd: int, data: memoryview, offset: int) -> None:
        written = 0
        while written < len(data):
            piece = self._calls.pwrite(fd, data[written:], offset + written)
            if piece == 0:
                raise OSError(errno.ENOSPC, "the disk takes no more")
            written += piece

    def _read(self, fd: int, into: memoryview, offset: int) -> int:
        num_read = 0
        while num_read < len(into):
            piece = self._calls.preadv(fd, [into[num_read:]], offset + num_read)
            if piece == 0:
                break
            num_read += piece
        return num_read


def _header_offset(slot: int) -> int:
    return (slot + 1) * SECTOR_BYTES
