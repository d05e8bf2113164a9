"""What a store in front of a conversation trace saves, by the order in which it forgets: a replay without a clock.

Each pair replays a random 80 % of the trace's conversations, by all orders. Room is a share of the trace's distinct
full blocks. Figures: share of the seconds of recomputing that hits save, of blocks found, and of those found in DRAM.
Run with `PYTHONPATH=loadtest/traces`; without `--trace` the pairs replay generated traces.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from harness import compare, report
from mooncake import BLOCK_TOKENS, Request, conversations, generate, read

from headrace.core.block import BlockHash
from headrace.core.cost import CostModel
from headrace.core.eviction import BlockFacts, ByValue, EvictionOrder, LeastRecentlyUsed, S3Fifo, block_seconds
from headrace.core.ledger import BlockLedger

COST = CostModel(step_s=0.02, prompt_s=0.0, token_s=4.4e-5, pair_s=8.3e-10, decode_s=0.0, context_s=0.0)
"""70e9 parameters, 80 layers of width 8192, at 3.2e15 operations per second; only token_s / pair_s matters here."""

ROOMS = (0.01, 0.05, 0.20)
DRAM, DISK = 0.05, 0.20
KEPT = 0.8
"""Share of the conversations in a pair's sample."""

Order = Callable[[int], EvictionOrder]
Chain = tuple[BlockHash, ...]

ORDERS: dict[str, Order] = {
    "LRU": lambda num_blocks: LeastRecentlyUsed(),
    "S3-FIFO": S3Fifo,
    "by value": lambda num_blocks: ByValue(COST, block_tokens=BLOCK_TOKENS, num_blocks=num_blocks),
}


@dataclass(slots=True, kw_only=True)
class Found:
    """What a replay found: blocks wanted, found, found in DRAM; seconds to recompute all, and those saved."""

    num_wanted: int = 0
    num_found: int = 0
    num_in_dram: int = 0
    wanted_s: float = 0.0
    saved_s: float = 0.0


class Store:
    """A ledger that whole chains are put into."""

    def __init__(self, num_blocks: int, order: Order) -> None:
        self._num_blocks = num_blocks
        self._ledger = BlockLedger(num_blocks, order(num_blocks))

    def holds(self, name: BlockHash) -> bool:
        """Return whether a block is here."""
        return self._ledger.lookup(name) is not None

    def keep(self, names: Sequence[BlockHash], facts: dict[BlockHash, BlockFacts]) -> tuple[BlockHash, ...]:
        """Use the blocks that are here and store the others, as many as there is room for; return what was evicted."""
        names = names[: self._num_blocks]
        shared = [block for block in map(self._ledger.lookup, names) if block is not None]
        new = [name for name in names if not self.holds(name)]
        granted = self._ledger.lease("request", len(new), shared=shared)
        for block, name in zip(granted[len(shared) :], new, strict=True):
            self._ledger.name(block, name, facts[name])
        self._ledger.release("request")
        return self._ledger.take_evicted()


def replay(chains: Sequence[Chain], dram: Store, disk: Store | None = None) -> Found:
    """Serve prompts one after the other; what DRAM evicts goes to disk, what is found on disk comes back to DRAM."""
    found, facts = Found(), facts_of(chains)
    for chain in chains:
        count_hits(chain, dram, disk, found)
        if disk is not None:
            disk.keep([name for name in chain if disk.holds(name)], facts)
        evicted = dram.keep(chain, facts)
        if disk is not None:
            disk.keep([name for name in reversed(evicted) if not disk.holds(name)], facts)
    return found


def count_hits(chain: Chain, dram: Store, disk: Store | None, found: Found) -> None:
    """Add what a prompt wants and finds: its longest prefix of blocks that either tier holds."""
    is_found = True
    for index, name in enumerate(chain):
        seconds = block_seconds(COST, BLOCK_TOKENS, index * BLOCK_TOKENS)
        is_found = is_found and (dram.holds(name) or (disk is not None and disk.holds(name)))
        found.num_wanted += 1
        found.wanted_s += seconds
        found.num_found += is_found
        found.num_in_dram += is_found and dram.holds(name)
        found.saved_s += seconds * is_found


def facts_of(chains: Sequence[Chain]) -> dict[BlockHash, BlockFacts]:
    """Return what orders may know of each block."""
    return {
        name: BlockFacts(parent=chain[index - 1] if index else None, num_tokens_before=index * BLOCK_TOKENS)
        for chain in chains
        for index, name in enumerate(chain)
    }


def sample(requests: Sequence[Request], seed: int) -> tuple[Chain, ...]:
    """Return the prompts of a random share of the conversations."""
    chosen = [request.full_ids for request in conversations(requests, KEPT, seed)]
    return tuple(tuple(BlockHash(number.to_bytes(16, "little")) for number in ids) for ids in chosen)


def bench(trace: Path | None, pairs: int, seed: int, results: Path | None) -> None:
    """Print the orders' savings over those of LRU, for one tier of several sizes and for two tiers."""
    requests = read(trace) if trace else ()

    @cache
    def chains(pair: int) -> tuple[Chain, ...]:
        return sample(requests or generate(pair), pair)

    @cache
    def run(order: str, shares: tuple[float, ...], pair: int) -> Found:
        footprint = len({name for chain in chains(pair) for name in chain})
        stores = [Store(int(share * footprint), ORDERS[order]) for share in shares]
        return replay(chains(pair), *stores)

    def saved(order: str, shares: tuple[float, ...], pair: int) -> float:
        found = run(order, shares, pair)
        return found.saved_s / found.wanted_s

    def work(order: str, shares: tuple[float, ...]) -> dict[str, float]:
        found = run(order, shares, seed)
        hits = {"blocks wanted": found.num_wanted, "hit rate": round(found.num_found / found.num_wanted, 4)}
        return hits | {"of it in DRAM": round(found.num_in_dram / found.num_wanted, 4)}

    for shares in (*((room,) for room in ROOMS), (DRAM, DISK)):
        rooms = " + disk ".join(f"{share:.0%}" for share in shares)
        for order in ("S3-FIFO", "by value"):
            ratio = compare(
                f"share of recompute seconds saved, DRAM {rooms} of {trace.stem if trace else 'a generated trace'}",
                baseline=("LRU", partial(saved, "LRU", shares)),
                candidate=(order, partial(saved, order, shares)),
                pairs=pairs,
                seed=seed,
                unit="of all",
                work=partial(work, order, shares),
            )
            report(ratio, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, help="a file of Mooncake's format")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    bench(options.trace, options.pairs, options.seed, options.results)
