"""Ways to move a batch of KV blocks between memory and disk, against copying the same bytes in memory.

Every way moves the same blocks, drawn anew each round, into or out of page-aligned memory. Cold reads begin with
an empty page cache; warm ones follow a read of the same blocks. Only `disk tier` also checks what it read.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import commit, compare, machine, record
from numpy.typing import NDArray

from headrace.clock import WallClock
from headrace.core.block import HASH_BYTES, BlockHash
from headrace.kvstore.disk import DiskTier, Written
from headrace.kvstore.disk_file import ALIGN_BYTES, DiskFile, DiskSpace
from headrace.kvstore.disk_header import SECTOR_BYTES
from headrace.kvstore.stored_block import StoredBlock
from headrace.transfer.agent import load_bindings
from headrace.transfer.arena import map_blocks

SMOLLM2_BLOCK_BYTES = 30 * 2 * 16 * 3 * 64 * 2
BLOCK_BYTES = (SMOLLM2_BLOCK_BYTES, 2 << 20)
BATCHES = (1, 16, 64)
FILE_BYTES = 512 << 20
NUM_THREADS = 4
NIXL_WAYS = ("use_aio", "use_uring", "use_posix_aio")
POLL_S = 50e-6
OPEN_SLOTS = 100_000

Slots = Sequence[int]
Way = Callable[[Slots], None]
"""Moves the blocks of some slots; the k-th is block k of the memory."""


class Nixl:
    """NIXL's POSIX backend over one file and one arena."""

    def __init__(self, option: str, fd: int, memory: NDArray[np.uint8], num_slots: int) -> None:
        self._nixl: Any = load_bindings()
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = False
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        self._agent = self._nixl.nixlAgent(option, config)
        backend = self._agent.createBackend("POSIX", {option: "true"})
        self._name, self._fd, self._block_bytes = option, fd, memory.shape[1]
        self._base = memory.ctypes.data
        for kind, row in (
            (self._nixl.DRAM_SEG, (self._base, memory.nbytes, 0)),
            (self._nixl.FILE_SEG, (0, num_slots * self._block_bytes, fd)),
        ):
            self._agent.registerMem(self._nixl.nixlRegDList(kind, np.array([row], dtype=np.uint64)), [backend])

    def move(self, operation: str, slots: Slots) -> None:
        """Read or write, and sleep between looks as the transfer thread does."""
        local = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, self._rows(self._base, range(len(slots)), 0))
        remote = self._nixl.nixlXferDList(self._nixl.FILE_SEG, self._rows(0, slots, self._fd))
        request = self._agent.createXferReq(getattr(self._nixl, operation), local, remote, self._name, b"", [])
        status = self._agent.postXferReq(request, b"")
        while status == self._nixl.NIXL_IN_PROG:
            time.sleep(POLL_S)
            status = self._agent.getXferStatus(request)
        self._agent.releaseXferReq(request)
        if status != self._nixl.NIXL_SUCCESS:
            raise OSError(f"NIXL: {status}")

    def _rows(self, base: int, blocks: Sequence[int], device: int) -> NDArray[np.uint64]:
        rows = np.empty((len(blocks), 3), dtype=np.uint64)
        rows[:, 0] = base + np.asarray(blocks, dtype=np.uint64) * np.uint64(self._block_bytes)
        rows[:, 1], rows[:, 2] = self._block_bytes, device
        return rows


def name_of(number: int) -> BlockHash:
    """Return a hash that stands for a slot's number."""
    return BlockHash(number.to_bytes(HASH_BYTES, "little"))


def in_threads(pool: ThreadPoolExecutor, call: Callable[[int, int], object], slots: Slots) -> None:
    """Do each block in a pool of threads."""
    list(pool.map(call, range(len(slots)), slots))


@contextmanager
def raw_ways(folder: Path, memory: NDArray[np.uint8], num_slots: int) -> Iterator[dict[str, dict[str, Way]]]:
    """Yield the ways that need no tier, for "read" and "write", on a file full of blocks that only they use."""
    size = memory.shape[1]
    buffered = os.open(folder / "raw", os.O_RDWR | os.O_CREAT)
    direct = os.open(folder / "raw", os.O_RDWR | os.O_DIRECT)
    for slot in range(num_slots):
        os.pwrite(direct, memory[slot % len(memory)].data, slot * size)
    os.fsync(buffered)
    copy = memory.copy()

    def read(fd: int, index: int, slot: int) -> object:
        return os.preadv(fd, [memory[index].data], slot * size)

    def write(fd: int, index: int, slot: int) -> object:
        return os.pwrite(fd, memory[index].data, slot * size)

    def memcpy(slots: Slots) -> None:
        for index in range(len(slots)):
            np.copyto(memory[index], copy[index])

    with ThreadPoolExecutor(NUM_THREADS) as pool, ThreadPoolExecutor(1) as single:
        nixls = {f"nixl {option}": Nixl(option, direct, memory, num_slots) for option in NIXL_WAYS}
        ways: dict[str, dict[str, Way]] = {"read": {"memcpy": memcpy}, "write": {"memcpy": memcpy}}
        for verb, call, code in (("read", read, "NIXL_READ"), ("write", write, "NIXL_WRITE")):
            for label, fd in (("direct", direct), ("buffered", buffered)):
                ways[verb][f"{label}, 1 thread"] = partial(in_threads, single, partial(call, fd))
                ways[verb][f"{label}, {NUM_THREADS} threads"] = partial(in_threads, pool, partial(call, fd))
            ways[verb] |= {name: partial(nixl.move, code) for name, nixl in nixls.items()}
        try:
            yield ways
        finally:
            os.close(buffered)
            os.close(direct)


@contextmanager
def tier_ways(folder: Path, memory: NDArray[np.uint8], num_slots: int) -> Iterator[dict[str, Way]]:
    """Yield the tier's own "read" and "write"; the latter forgets each block first."""
    space = DiskSpace(
        folder=folder / "tier",
        block_bytes=memory.shape[1],
        capacity_bytes=(memory.shape[1] + ALIGN_BYTES) * (num_slots + 1),
        format_id=b"bench",
    )
    tier = DiskTier(space, WallClock(), NUM_THREADS)
    with asyncio.Runner() as runner:
        runner.run(tier.open())

        async def write(slots: Slots) -> None:
            for slot in slots:
                tier.forget(name_of(slot))
            entries = [(StoredBlock(block_hash=name_of(slot), tenant="t"), memory[i]) for i, slot in enumerate(slots)]
            if set(await tier.write(entries)) != {Written.STORED}:
                raise OSError("a block was not stored")

        async def read(slots: Slots) -> None:
            if not all(await asyncio.gather(*(tier.read(name_of(slot), memory[i]) for i, slot in enumerate(slots)))):
                raise OSError("a block was not read")

        for first in range(0, num_slots, len(memory)):
            runner.run(write(range(first, min(num_slots, first + len(memory)))))
        try:
            loop = runner.get_loop()  # Its `run` would add handlers of signals to each figure.
            yield {
                "read": lambda slots: loop.run_until_complete(read(slots)),
                "write": lambda slots: loop.run_until_complete(write(slots)),
            }
        finally:
            runner.run(tier.close())


def drop_cache(folder: Path) -> None:
    """Take all payloads in a folder out of the page cache."""
    for path in (folder / "raw", *folder.rglob("payloads")):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def time_ways(
    ways: Mapping[str, Way], batches: Sequence[Slots], prepare: Callable[[Way, Slots], None]
) -> dict[str, list[float]]:
    """Return the seconds of each batch by way; every second round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn, slots in enumerate(batches):
        for name in list(ways) if turn % 2 == 0 else reversed(list(ways)):
            prepare(ways[name], slots)
            begun_s = time.perf_counter()
            ways[name](slots)
            times[name].append(time.perf_counter() - begun_s)
    return times


def show(what: str, times: dict[str, list[float]], num_bytes: int, seed: int, results: Path | None) -> None:
    """Print each way's rate and its seconds over those of the copy and over those of the tier."""
    for way in times:
        texts = []
        for peer in ("memcpy", "disk tier"):
            ratio = compare(
                what,
                baseline=(peer, lambda pair, peer=peer: times[peer][pair - seed]),  # type: ignore[misc]
                candidate=(way, lambda pair, way=way: times[way][pair - seed]),  # type: ignore[misc]
                pairs=len(times[way]),
                seed=seed,
                work=lambda: {"bytes": num_bytes},
            )
            texts.append(f"/{peer} {ratio.ratio:6.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
            if results is not None:
                record(ratio, results)
        rate = num_bytes / statistics.median(times[way]) / 1e9
        print(f"{what:34} {way:20} {rate:6.2f} GB/s  {'  '.join(texts)}", flush=True)


def bench_blocks(folder: Path, block_bytes: int, options: argparse.Namespace) -> None:
    """Compare all ways for blocks of one size."""
    num_slots = FILE_BYTES // block_bytes
    memory = map_blocks(max(BATCHES), block_bytes)
    generator = np.random.default_rng(options.seed)
    memory[:] = generator.integers(0, 256, memory.shape, dtype=np.uint8)
    with raw_ways(folder, memory, num_slots) as raw, tier_ways(folder, memory, num_slots) as tier:
        for num_blocks in BATCHES:
            for what, verb, prepare in (
                ("cold", "read", lambda way, slots: drop_cache(folder)),
                ("warm", "read", lambda way, slots: way(slots)),
                ("", "write", lambda way, slots: None),
            ):
                batches = [
                    generator.choice(num_slots, num_blocks, replace=False).tolist() for _ in range(options.pairs)
                ]
                times = time_ways({**raw[verb], "disk tier": tier[verb]}, batches, prepare)
                title = f"{what} {verb} of {num_blocks} x {block_bytes}".strip()
                show(title, times, num_blocks * block_bytes, options.seed, options.results)


def bench_open(folder: Path) -> None:
    """Print how long a start takes with many blocks on disk."""
    space = DiskSpace(
        folder=folder / "many",
        block_bytes=ALIGN_BYTES,
        capacity_bytes=(ALIGN_BYTES + SECTOR_BYTES) * OPEN_SLOTS + SECTOR_BYTES,
        format_id=b"bench",
    )
    file, payload = DiskFile(space, os), memoryview(bytes(ALIGN_BYTES))
    file.open()
    for slot in range(OPEN_SLOTS):
        file.write(slot, StoredBlock(block_hash=name_of(slot), tenant="tenant"), payload)
    file.close()

    async def start() -> int:
        tier = DiskTier(space, WallClock())
        found = await tier.open()
        await tier.close()
        return len(found)

    fd = os.open(space.folder / "headers", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    begun_s = time.perf_counter()
    num_found = asyncio.run(start())
    print(f"start: {num_found} headers read from disk in {time.perf_counter() - begun_s:.2f} s")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    print(f"{machine()}; commit {commit()}; seed {options.seed}; {options.pairs} rounds")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench_open(Path(folder))
        for block_bytes in BLOCK_BYTES:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                bench_blocks(Path(own), block_bytes, options)


if __name__ == "__main__":
    main()
