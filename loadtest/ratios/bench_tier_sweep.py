"""What tiers cost where they do not help: first tokens of a worker with tiers over those of one without any.

Real processes of the bundled model, asked one prompt at a time, every prompt a new one. Each round asks all cells of a
length in turn, every second round backwards. Cells: the lane (shared memory, tcp, disk) times the share of the prompt
that the store holds; `0` is a store that holds nothing of it, asked because nobody knows better. `stops` is a store
that has been stopped while it is believed to hold everything, `stopped` the prompt after that. `control` is a second
worker without tiers: what its ratios differ from 1 is noise.

The bar is 1.03. A cell is marked `over` when its median is above it, `noise` when so is the control's spread.
"""

import argparse
import signal
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from feeder import Feeder
from harness import Ratio, commit, compare, machine, record
from measure import fresh_tokens
from stage import Answer, Service, Stage, Worker

from headrace.core.placement import Tier
from headrace.core.request import CachedPrefix
from headrace.testing.cluster import wait_until

ROUNDS = {64: 7, 256: 4, 1024: 2, 4096: 2}
"""By the prompt's tokens: more where a round is short."""
SHARES = (0.0, 0.5, 1.0)
BAR = 1.03
BASELINE, CONTROL = "none", "control"
STOPS, STOPPED = "stops", "stopped"
LANES = ("shm", "tcp", "disk", STOPS)
WORKER_BYTES = 256 << 20
STORE_BYTES = 1 << 30
SMALL_STORE_BYTES = 200 << 20
"""Of the store whose blocks are to be on its disk only."""
DISK_BYTES = 8 << 30
QUIET_S = 10.0
HEAD = "| tokens | cell | ratio (least-most, rounds) | medians | tokens not computed | |\n|---|---|---|---|---|---|"

Cell = Callable[[int, int], Answer]
"""Asks a prompt of so many tokens, made from a seed."""


class Cells:
    """The processes, and what is asked of them.

    Args:
        stage: Where they run.
        lanes: Which of `LANES` are played.
    """

    def __init__(self, stage: Stage, lanes: Sequence[str]) -> None:
        settings = {"cache_dir": stage.folder / "cache", "kv_memory_bytes": WORKER_BYTES}
        disk = {
            "memory_bytes": SMALL_STORE_BYTES,
            "eviction": "lru",
            "disk_dir": stage.folder,
            "disk_bytes": DISK_BYTES,
        }
        self._none = stage.worker(BASELINE, (), settings)
        self._control = stage.worker(CONTROL, (), settings)
        self._stores: dict[str, Service] = {}
        self._workers: dict[str, Worker] = {}
        for name in lanes:
            env = {"UCX_TLS": "tcp"} if name == "tcp" else {}
            limits = disk if name == "disk" else {"memory_bytes": STORE_BYTES}
            self._stores[name] = stage.store(name, limits, env=env)
            self._workers[name] = stage.worker(f"{name}-worker", (self._stores[name],), settings, env=env)
        self._feeder = stage.enter_context(Feeder(self._none, "bench-feeder"))
        self.cost = self._none.cost()

    def all(self) -> dict[str, Cell]:
        """Return the cells by name, in the order of a round."""
        cells: dict[str, Cell] = {BASELINE: partial(self._plain, self._none)}
        for lane in self._stores:
            if lane == STOPS:
                cells[STOPS] = self._stops
                cells[STOPPED] = partial(self._believed, STOPS, 1.0)
            else:
                # Nothing of it on a disk is the same call as nothing of it in memory.
                asked = SHARES if lane != "disk" else SHARES[1:]
                cells |= {f"{lane} {share:.0%}": partial(self._held, lane, share) for share in asked}
        return cells | {CONTROL: partial(self._plain, self._control)}

    def warm(self, length: int) -> None:
        """Fill lanes' meters, and caches of the machine."""
        for seed in range(3):
            for lane in self._stores:
                self._held(lane, 1.0, length, 90_000 + seed)
        self._plain(self._none, length, 90_010)
        self._plain(self._control, length, 90_011)

    def _plain(self, worker: Worker, length: int, seed: int) -> Answer:
        return worker.ask(fresh_tokens(seed, length))

    def _held(self, lane: str, share: float, length: int, seed: int) -> Answer:
        prompt = fresh_tokens(seed, length)
        self._fill(lane, prompt, share)
        return self._ask(lane, prompt, share)

    def _believed(self, lane: str, share: float, length: int, seed: int) -> Answer:
        """Ask for what the store does not hold."""
        return self._ask(lane, fresh_tokens(seed, length), share)

    def _stops(self, length: int, seed: int) -> Answer:
        """Stop a store that has just answered; its successor has another epoch, so nothing is known of its lane."""
        store = self._stores[STOPS]
        store.signal(signal.SIGCONT)
        store.restart()
        self._feeder.forget(store)
        before = self._workers[STOPS].load().reuse.dram_tokens
        for turn in range(20):
            self._held(STOPS, 1.0, 512, seed + 1_000_000 * (turn + 1))
            if self._workers[STOPS].load().reuse.dram_tokens > before:
                break
        prompt = fresh_tokens(seed, length)
        self._fill(STOPS, prompt, 1.0)
        store.signal(signal.SIGSTOP)
        return self._ask(STOPS, prompt, 1.0)

    def _num_held(self, lane: str, length: int, share: float) -> int:
        return int(share * ((length - 1) // self._workers[lane].layout.block_tokens))

    def _fill(self, lane: str, prompt: list[int], share: float) -> None:
        num_held = self._num_held(lane, len(prompt), share)
        store, feeder = self._stores[lane], self._feeder
        feeder.put(store, self._workers[lane].hashes(prompt)[:num_held])
        if lane == "disk" and num_held:
            _quiet(store)
            filler = fresh_tokens(prompt[0] + 7 * prompt[1], SMALL_STORE_BYTES // self._none.layout.block_bytes * 16)
            feeder.put(store, self._none.hashes(filler))
            _quiet(store)

    def _ask(self, lane: str, prompt: list[int], share: float) -> Answer:
        worker, num_held = self._workers[lane], self._num_held(lane, len(prompt), share)
        tier = Tier.DISK if lane == "disk" else Tier.DRAM
        held = CachedPrefix(location=lane, address=self._stores[lane].address, tier=tier, start=0, end=num_held)
        answer = worker.ask(prompt, (held,) if num_held else ())
        worker.settle()
        return answer


def _quiet(store: Service) -> None:
    """Wait until a store has written to disk what it has."""

    def written() -> int:
        return store.load().store.num_disk_written_blocks

    last = [-1]

    def is_quiet() -> bool:
        before, last[0] = last[0], written()
        return before == last[0]

    wait_until(is_quiet, QUIET_S, lambda: "the store goes on writing")


def sweep(cells: dict[str, Cell], length: int, num_rounds: int, seed: int) -> dict[str, list[Answer]]:
    """Ask all cells `num_rounds` times."""
    answers: dict[str, list[Answer]] = {name: [] for name in cells}
    for turn in range(num_rounds):
        for number, name in enumerate(cells if turn % 2 == 0 else reversed(cells)):
            if name == STOPPED and turn % 2:  # Only after `stops`.
                continue
            answers[name].append(cells[name](length, seed + 100_000 * length + 100 * turn + number))
            if name == STOPS and turn % 2:
                answers[STOPPED].append(cells[STOPPED](length, seed + 100_000 * length + 100 * turn + 50))
    return answers


def ratios(answers: dict[str, list[Answer]], length: int, seed: int) -> list[Ratio]:
    """Return each cell's ratio to the worker without tiers."""

    def figure(name: str, pair: int) -> float:
        return answers[name][pair - seed].seconds

    return [
        compare(
            f"{length} tokens, {name}",
            baseline=(BASELINE, partial(figure, BASELINE)),
            candidate=(name, partial(figure, name)),
            pairs=len(found),
            seed=seed,
            work=partial(_work, found),
        )
        for name, found in answers.items()
        if name != BASELINE
    ]


def _work(answers: Sequence[Answer]) -> dict[str, float]:
    return {"tokens not computed": statistics.median(each.num_cached for each in answers)}


def show(found: list[Ratio], length: int) -> None:
    """Print a table of one length."""
    noise = next(each for each in found if each.candidate_name == CONTROL)
    for each in found:
        mark = "" if each.ratio <= BAR else "noise" if noise.high >= each.ratio else "OVER"
        print(
            f"| {length} | {each.candidate_name} | {each.ratio:.3f} ({each.low:.3f}-{each.high:.3f}, {each.pairs}) "
            f"| {1e3 * each.candidate:.0f} / {1e3 * each.baseline:.0f} ms | {each.work['tokens not computed']:.0f} "
            f"| {mark} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=tuple(ROUNDS))
    parser.add_argument("--lanes", nargs="*", choices=LANES, default=LANES)
    parser.add_argument("--rounds", type=int, help="of every length; by default more of the short ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    print(f"with tiers / without; seed {options.seed}; {machine()}; commit {commit()}\n")
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        cells = Cells(stage, options.lanes)
        print(f"steps cost {cells.cost}\n")
        print(HEAD)
        cells.warm(min(options.lengths))
        for length in options.lengths:
            num_rounds = options.rounds or ROUNDS.get(length, 2)
            found = ratios(sweep(cells.all(), length, num_rounds, options.seed), length, options.seed)
            show(found, length)
            for each in found if options.results else ():
                record(each, options.results)


if __name__ == "__main__":
    main()
