"""One side of the comparison of indexes, in a process of its own: answers questions, a JSON line each.

Usage: PYTHON index_side.py headrace|dynamo. Imports nothing of the other side, so that each runs in its own
environment.
"""

import gc
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

CHAIN_BLOCKS = 8192
NUM_WORKERS = 4
HASH_BYTES = 16
"""Of headrace; the other index names blocks by 64 bits, for which the first half is taken."""
PAGE_BYTES = 4096

Chain = list[bytes]


class Side(Protocol):
    """An index, and how it is spoken to."""

    def event(self, worker: int, sequence: int, parent: bytes | None, hashes: Chain) -> bytes:
        """Return the event of blocks that were stored, as it comes over the wire."""

    def apply(self, worker: int, data: bytes) -> object:
        """Take an event in."""

    def matcher(self, hashes: Chain) -> Callable[[], int]:
        """Return what looks up a chain and gives the longest match."""


class Headrace:
    """The index of headrace, Python."""

    def __init__(self) -> None:
        self._events = importlib.import_module("headrace.index.events")
        self._tier = importlib.import_module("headrace.core.placement").Tier.DEVICE
        self._index = importlib.import_module("headrace.index.prefix_index").PrefixIndex(1 << 31, NUM_WORKERS)

    def event(self, worker: int, sequence: int, parent: bytes | None, hashes: Chain) -> bytes:
        """Return an event as protobuf; it does not name a parent."""
        change = self._events.Change(kind=self._events.ChangeKind.STORED, tier=self._tier, hashes=tuple(hashes))
        event = self._events.Event(location=str(worker), epoch="1", sequence=sequence, changes=(change,))
        return bytes(self._events.event_to_bytes(event))

    def apply(self, worker: int, data: bytes) -> object:
        """Read and take in."""
        return self._index.apply(self._events.event_from_bytes(data))

    def matcher(self, hashes: Chain) -> Callable[[], int]:
        """Return a look-up of the hashes as bytes."""
        wanted = tuple(hashes)
        return lambda: int(self._index.match(wanted)[0].num_blocks)


class Dynamo:
    """The radix index of ai-dynamo-runtime, Rust, through its Python class."""

    def __init__(self) -> None:
        self._tree = importlib.import_module("dynamo._core").RadixTree()

    def event(self, worker: int, sequence: int, parent: bytes | None, hashes: Chain) -> bytes:
        """Return an event as JSON, the one form that its Python class takes."""
        blocks = [{"block_hash": _short(name), "tokens_hash": _short(name)} for name in hashes]
        stored = {"parent_hash": None if parent is None else _short(parent), "blocks": blocks}
        return json.dumps({"event_id": sequence, "data": {"stored": stored}}).encode()

    def apply(self, worker: int, data: bytes) -> object:
        """Read and take in."""
        return self._tree.apply_event(worker, data)

    def matcher(self, hashes: Chain) -> Callable[[], int]:
        """Return a look-up of the hashes as numbers."""
        wanted = [_short(name) for name in hashes]
        return lambda: int(max(self._tree.find_matches(wanted).scores.values()))


def _short(name: bytes) -> int:
    return int.from_bytes(name[:8], "little")


def _chains(seed: int, num_blocks: int) -> Iterator[Chain]:
    for number in range(num_blocks // CHAIN_BLOCKS):
        raw = hashlib.shake_128(f"{seed} {number}".encode()).digest(CHAIN_BLOCKS * HASH_BYTES)
        yield [raw[start : start + HASH_BYTES] for start in range(0, len(raw), HASH_BYTES)]


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def fill(side: Side, seed: int, num_blocks: int, event_blocks: int) -> dict[str, float]:
    """Store chains; return the seconds of processor and wall time it took, and the memory that it took."""
    sequences = [0] * NUM_WORKERS
    cpu_s = wall_s = 0.0
    before_bytes = _resident_bytes()
    for number, chain in enumerate(_chains(seed, num_blocks)):
        worker = number % NUM_WORKERS
        events = []
        for start in range(0, CHAIN_BLOCKS, event_blocks):
            parent = chain[start - 1] if start else None
            events.append(side.event(worker, sequences[worker], parent, chain[start : start + event_blocks]))
            sequences[worker] += 1
        begun = time.process_time(), time.perf_counter()
        for event in events:
            side.apply(worker, event)
        cpu_s += time.process_time() - begun[0]
        wall_s += time.perf_counter() - begun[1]
        # One side applies in a thread of its own: its work counts too.
        begun = time.process_time(), time.perf_counter()
        assert side.matcher(chain[:1])() == 1
        cpu_s += time.process_time() - begun[0]
        wall_s += time.perf_counter() - begun[1]
        del events, chain
    return {"cpu_s": cpu_s, "wall_s": wall_s, "resident_bytes": _resident_bytes() - before_bytes}


def match(side: Side, seed: int, num_blocks: int, length: int, calls: int) -> dict[str, float]:
    """Look up beginnings of stored chains; return the median and the 99th percentile of the seconds of a call.

    On a busy machine the percentile of wall time is that of the scheduler; hence also the one of processor time.

    Prompts take turns, so that each finds the caches of the processor as cold as the others left them.
    """
    chains = list(_chains(seed, num_blocks))
    times: list[float] = []
    cpu_times: list[float] = []
    for turn in range(calls):
        find = side.matcher([bytes(bytearray(name)) for name in chains[turn % len(chains)][:length]])
        begun = time.perf_counter(), time.process_time()
        found = find()
        times.append(time.perf_counter() - begun[0])
        cpu_times.append(time.process_time() - begun[1])
        assert found == length
    times.sort()
    cpu_times.sort()
    return {
        "p50_s": times[calls // 2],
        "p99_s": times[calls * 99 // 100],
        "p99_cpu_s": cpu_times[calls * 99 // 100],
    }


def main() -> None:
    """Answer until stdin ends."""
    sides: dict[str, Callable[[], Side]] = {"headrace": Headrace, "dynamo": Dynamo}
    side = sides[sys.argv[1]]()
    questions: dict[str, Callable[..., dict[str, float]]] = {"fill": fill, "match": match}
    for line in sys.stdin:
        question = json.loads(line)
        answer = questions[question.pop("do")](side, **question)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
