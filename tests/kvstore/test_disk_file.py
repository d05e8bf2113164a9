"""Slots on disk: whatever happens to the files, a read gives the bytes that were written or says no."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.block import BlockHash
from headrace.errors import ConfigError
from headrace.kvstore.disk_file import DiskFile, DiskSpace
from headrace.kvstore.disk_header import SECTOR_BYTES
from headrace.kvstore.stored_block import StoredBlock
from headrace.transfer.arena import map_blocks

NUM_SLOTS = 4
SIZES = (4096, 1000)
"""One that bypasses the page cache, and one that cannot."""


class Killed(Exception):  # noqa: N818 not an error of the disk
    """The process is gone."""


class LosingDisk:
    """A disk that keeps, of each write, the first bytes only: `kept` says what share of which write."""

    def __init__(self, kept):
        self._kept = iter(kept)

    def pwrite(self, fd, data, offset):
        keep = int(len(data) * next(self._kept, 1.0)) // SECTOR_BYTES * SECTOR_BYTES
        keep = len(data) if keep > len(data) - SECTOR_BYTES else keep
        if keep:
            # Through the page cache: parts of a block are not what a bypass can write.
            path = Path(f"/proc/self/fd/{fd}").resolve()
            buffered = os.open(path, os.O_RDWR)
            os.pwrite(buffered, data[:keep], offset)
            os.close(buffered)
        return len(data)

    preadv = staticmethod(os.preadv)


class DyingDisk:
    """A disk whose process is killed in its write number `last`, of which `share` gets there."""

    def __init__(self, last, share):
        self._left = last
        self._share = share

    def pwrite(self, fd, data, offset):
        if not self._left:
            LosingDisk([self._share]).pwrite(fd, data, offset)
            raise Killed
        self._left -= 1
        return os.pwrite(fd, data, offset)

    preadv = staticmethod(os.preadv)


def space(folder, size=4096, num_slots=NUM_SLOTS, format_id=b"f"):
    slot_bytes = -(-size // 4096) * 4096 + SECTOR_BYTES
    return DiskSpace(
        folder=Path(folder), block_bytes=size, capacity_bytes=SECTOR_BYTES + num_slots * slot_bytes, format_id=format_id
    )


def opened(folder, size=4096, calls=os, **changes):
    file = DiskFile(space(folder, size, **changes), calls)
    file.open()
    return file


def block(number):
    return StoredBlock(block_hash=BlockHash(number.to_bytes(16, "little")), tenant="t", stored_unix_ms=number)


def payload(number, size):
    memory = map_blocks(1, size)[0]
    memory[:] = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
    return memory.data


def write(file, slot, number, size):
    return file.write(slot, block(number), payload(number, size))


def found(file, size):
    """Return the numbers of the blocks that can be read, and insist that their bytes are right."""
    numbers = set()
    for slot, header in file.scan().headers.items():
        into = payload(999, size)
        if file.read(slot, header.checksum, into):
            number = int.from_bytes(header.block.block_hash, "little")
            assert into == payload(number, size)
            numbers.add(number)
    return numbers


@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_there_after_a_restart(tmp_path, size):
    file = opened(tmp_path, size)
    for slot in range(NUM_SLOTS):
        write(file, slot, slot + 1, size)
    file.close()
    again = opened(tmp_path, size)
    assert [again.scan().headers[slot].block for slot in range(NUM_SLOTS)] == [block(slot + 1) for slot in range(4)]
    assert found(again, size) == {1, 2, 3, 4}
    again.close()


def test_memory_at_any_address_can_be_written_and_read(tmp_path):
    file = opened(tmp_path)
    memory = map_blocks(3, 4096).reshape(-1)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.size, dtype=np.uint8)
    checksum = file.write(0, block(1), memory[10 : 10 + 4096].data)
    into = np.zeros(5000, dtype=np.uint8)[3 : 3 + 4096]
    assert file.read(0, checksum, into.data)
    assert np.array_equal(into, memory[10 : 10 + 4096])
    file.close()


def test_a_cleared_slot_is_empty_after_a_restart(tmp_path):
    file = opened(tmp_path)
    write(file, 0, 1, 4096)
    write(file, 1, 2, 4096)
    file.clear(0)
    file.close()
    again = opened(tmp_path)
    assert found(again, 4096) == {2}
    again.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_process_killed_within_an_overwrite_leaves_the_old_block_the_new_one_or_none(tmp_path, size, last, share):
    file = opened(tmp_path, size)
    write(file, 0, 1, size)
    write(file, 1, 2, size)
    file.close()
    dying = opened(tmp_path, size, DyingDisk(last, share))
    with pytest.raises(Killed):
        write(dying, 0, 3, size)
    dying.close()
    again = opened(tmp_path, size)
    num_sectors = {0: 1, 1: -(-size // SECTOR_BYTES), 2: 1}[last]
    is_header_written = int(num_sectors * share) == num_sectors
    expected = {(0, False): {1}, (2, True): {3}}.get((last, is_header_written), set())
    assert found(again, size) == {2} | expected
    again.close()


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    puts=st.lists(st.tuples(st.integers(0, NUM_SLOTS - 1), st.integers(1, 9), st.booleans()), max_size=12),
    kept=st.lists(st.sampled_from((0.0, 0.3, 0.7, 1.0)), max_size=40),
)
def test_a_machine_that_loses_any_of_its_writes_gives_no_wrong_byte(size, puts, kept):
    with TemporaryDirectory() as folder:
        file = opened(folder, size, LosingDisk(kept))
        for slot, number, is_put in puts:
            if is_put:
                write(file, slot, number, size)
            else:
                file.clear(slot)
        file.close()
        again = opened(folder, size)
        assert found(again, size) <= {number for _, number, is_put in puts if is_put}
        again.close()


damages = st.tuples(
    st.sampled_from(("headers", "payloads")),
    st.sampled_from(("cut", "zero", "flip", "noise")),
    st.floats(0, 1),
    st.integers(1, 3000),
)


def damage(path, how, where, length):
    data = bytearray(path.read_bytes())
    start = int(where * len(data))
    piece = slice(start, min(len(data), start + length))
    if how == "cut":
        del data[start:]
    elif how == "zero":
        data[piece] = bytes(piece.stop - start)
    elif how == "flip" and start < len(data):
        data[start] ^= 1 << length % 8
    elif how == "noise":
        data[piece] = np.random.default_rng(length).bytes(piece.stop - start)
    path.write_bytes(data)


@settings(max_examples=50, deadline=None)
@given(size=st.sampled_from(SIZES), done=st.lists(damages, min_size=1, max_size=4), is_open=st.booleans())
def test_files_damaged_anywhere_give_no_wrong_byte(size, done, is_open):
    with TemporaryDirectory() as folder:
        file = opened(folder, size)
        for slot in range(NUM_SLOTS):
            write(file, slot, slot + 1, size)
        if not is_open:
            file.close()
        for name, how, where, length in done:
            damage(Path(folder) / name, how, where, length)
        if not is_open:
            file = opened(folder, size)
        assert found(file, size) <= {1, 2, 3, 4}
        file.close()


def test_damage_to_one_block_costs_no_other(tmp_path):
    file = opened(tmp_path)
    for slot in range(NUM_SLOTS):
        write(file, slot, slot + 1, 4096)
    file.close()
    damage(tmp_path / "payloads", "flip", 0.3, 1)
    damage(tmp_path / "headers", "flip", 0.9, 1)
    again = opened(tmp_path)
    assert again.scan().num_torn == 1
    assert found(again, 4096) == {1, 3}
    again.close()


@pytest.mark.parametrize("change", [{"size": 8192}, {"format_id": b"other"}])
def test_blocks_of_another_format_are_dropped_for_good(tmp_path, change):
    file = opened(tmp_path)
    write(file, 0, 1, 4096)
    file.close()
    other = opened(tmp_path, **change)
    assert not other.scan().headers
    other.close()
    back = opened(tmp_path)
    assert not back.scan().headers
    back.close()


@pytest.mark.parametrize(("num_slots", "numbers"), [(2, {1, 2}), (9, {1, 2, 3, 4})])
def test_a_folder_of_another_size_keeps_the_blocks_that_fit(tmp_path, num_slots, numbers):
    file = opened(tmp_path)
    for slot in range(NUM_SLOTS):
        write(file, slot, slot + 1, 4096)
    file.close()
    resized = opened(tmp_path, num_slots=num_slots)
    assert found(resized, 4096) == numbers
    resized.close()


def test_a_folder_takes_no_more_bytes_than_it_was_given(tmp_path):
    file = opened(tmp_path, num_slots=100)
    limit = space(tmp_path, num_slots=100).capacity_bytes
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    file.close()


def test_a_folder_is_used_once_at_a_time(tmp_path):
    file = opened(tmp_path)
    with pytest.raises(ConfigError, match="another process"):
        opened(tmp_path)
    write(file, 0, 1, 4096)
    file.close()
    again = opened(tmp_path)
    assert found(again, 4096) == {1}
    again.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot hold blocks"):
        opened(tmp_path / "file" / "folder")


def test_room_for_no_block_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="hold no block"):
        space(tmp_path, num_slots=0)
