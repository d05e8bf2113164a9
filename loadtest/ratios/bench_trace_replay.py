"""A conversation trace through real tiers: what a worker finds where, and how much of its reading is not hidden.

A kvstore (arena, disk files) and a worker, both real processes over NIXL, replay a random share of a trace's
conversations. A block of the trace, 512 tokens, becomes one of 16 tokens with the same name everywhere; rooms are
shares of the distinct blocks. The model is a Llama of four layers with random weights, drawn here, whose seconds per
byte of KV are those of the bundled model on two cores. Nobody tells the worker who holds what: it asks the store. Its
own pool has room for the longest prompt and a few short ones.

Prompts arrive as in the trace, so much faster that what even an infinite cache leaves to compute keeps the engine busy
for `--load` of the time, by the measured cost of steps.

Hit rate: full blocks of prompts that were not computed, over all; the ideal one is that of an infinite cache that has
a prompt's blocks as soon as it is sent. Not hidden: of the time in which any READ was under way, the share in which
the engine ran no step; likewise for fetches, which begin with the choice of sources and contain all control calls. So
what delays a prompt while others are computed counts as hidden, and what a step waits for does not.

Run with `PYTHONPATH=loadtest/traces`; without `--trace` it replays a generated one.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from harness import Ratio, compare, report
from mooncake import BLOCK_TOKENS as TRACE_BLOCK_TOKENS
from mooncake import Request, conversations, generate, read
from stage import Stage, Worker

from headrace.core.cost import CostModel

TRACED = str(Path(__file__).with_name("traced_worker.py"))
BLOCK_TOKENS = 16
VOCAB_SIZE = 1024
NUM_LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 64
BLOCK_BYTES = NUM_LAYERS * 2 * BLOCK_TOKENS * KV_HEADS * HEAD_DIM * 2
DRAM, DISK = 0.05, 0.20
SPARE_BLOCKS = 64
MOST_WAITING = 48
"""Prompts in flight at most; the next one waits for an answer."""
CHUNK_TOKENS = 512
COLUMNS = (
    *("tiers", "own", "DRAM", "disk", "all", "of the ideal"),
    *("READs not hidden", "fetches not hidden", "busy", "first token", "not stored"),
)

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a replay came to.

    Attributes:
        rates: Share of the full blocks found, by tier.
        ideal: That of an infinite cache.
        read_s: Seconds in which a READ was under way.
        bare_read: Share of them without a step.
        fetch_s: Seconds in which a fetch was under way.
        bare_fetch: Share of them without a step.
        busy: Share of the replay in which the engine ran a step.
        first_s: Median seconds to the first token.
        num_dropped: Blocks that were not stored, for too many waited.
    """

    rates: dict[str, float]
    ideal: float
    read_s: float
    bare_read: float
    fetch_s: float
    bare_fetch: float
    busy: float
    first_s: float
    num_dropped: int

    @property
    def rate(self) -> float:
        """Share of the full blocks found in any tier."""
        return sum(self.rates.values())


def write_model(folder: Path, seed: int) -> Path:
    """Write a model of random weights; return its folder."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompt_of(request: Request) -> list[int]:
    """Return a prompt whose blocks are the same where those of the trace are."""
    num_tokens = max(1, request.input_tokens * BLOCK_TOKENS // TRACE_BLOCK_TOKENS)
    return [token for name in request.hash_ids for token in _tokens(name)][:num_tokens]


def ideal_rate(requests: Iterable[Request]) -> float:
    """Return the share of full blocks that an infinite cache has, the last token of a prompt being computed."""
    seen: set[int] = set()
    num_found, num_wanted = 0, 0
    for request in requests:
        num_found += num_cached(request, seen)
        num_wanted += len(request.full_ids)
        seen.update(request.full_ids)
    return num_found / num_wanted


def num_cached(request: Request, seen: set[int]) -> int:
    """Return how many leading blocks of a prompt are among those seen; never all of its tokens."""
    usable = request.full_ids[: (len(prompt_of(request)) - 1) // BLOCK_TOKENS]
    return next((index for index, name in enumerate(usable) if name not in seen), len(usable))


def span_for(requests: Sequence[Request], cost: CostModel, load: float) -> float:
    """Return in how many seconds to send the prompts."""
    seen: set[int] = set()
    total_s = 0.0
    for request in requests:
        num_tokens, num_done = len(prompt_of(request)), BLOCK_TOKENS * num_cached(request, seen)
        total_s += cost.prefill(num_tokens - num_done, num_done, chunk_tokens=CHUNK_TOKENS)
        seen.update(request.full_ids)
    return total_s / load


def replay(worker: Worker, requests: Sequence[Request], span_s: float) -> list[float]:
    """Send prompts at their scaled times; return the seconds to each first token."""
    first_s, all_s = requests[0].at_s, requests[-1].at_s - requests[0].at_s
    begun_s = time.monotonic()
    with ThreadPoolExecutor(MOST_WAITING) as senders:
        answers = []
        for request in requests:
            due_s = begun_s + span_s * (request.at_s - first_s) / all_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            answers.append(senders.submit(worker.ask, prompt_of(request)))
        return [answer.result().seconds for answer in answers]


def play(requests: Sequence[Request], *, has_disk: bool, load: float, seed: int) -> Found:
    """Run one store and one worker, and replay all requests."""
    num_distinct = len({name for request in requests for name in request.full_ids})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        intervals = folder / "intervals"
        with Stage(folder) as stage:
            disk = {"disk_dir": folder, "disk_bytes": int(DISK * num_distinct) * BLOCK_BYTES} if has_disk else {}
            store = stage.store("store", {"memory_bytes": int(DRAM * num_distinct) * BLOCK_BYTES, **disk})
            longest = max(len(request.hash_ids) for request in requests)
            settings = {
                "model": write_model(folder / "model", seed),
                "dtype": "bf16",
                "cache_dir": folder / "cache",
                "kv_memory_bytes": (longest + SPARE_BLOCKS) * BLOCK_BYTES,
            }
            worker = stage.worker("worker", (store,), settings, program=(TRACED, str(intervals)))
            span_s = span_for(requests, worker.cost(), load)
            print(f"{len(requests)} prompts in {span_s:.0f} s; steps cost {worker.cost()}", file=sys.stderr, flush=True)
            begun_s = time.monotonic()
            seconds = replay(worker, requests, span_s)
            during = (begun_s, time.monotonic())
            found = _rates(worker, requests)
            num_dropped = worker.load().reuse.num_dropped_blocks
        by_kind = _read_intervals(intervals, during)
    steps = by_kind["step"]
    return Found(
        rates=found,
        ideal=ideal_rate(requests),
        read_s=_length(by_kind["read"]),
        bare_read=_bare(by_kind["read"], steps),
        fetch_s=_length(by_kind["fetch"]),
        bare_fetch=_bare(by_kind["fetch"], steps),
        busy=_length(steps) / (during[1] - during[0]),
        first_s=float(np.median(seconds)),
        num_dropped=num_dropped,
    )


@cache
def _tokens(name: int) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(name).integers(3, VOCAB_SIZE, BLOCK_TOKENS))


def _rates(worker: Worker, requests: Sequence[Request]) -> dict[str, float]:
    num_tokens = BLOCK_TOKENS * sum(len(request.full_ids) for request in requests)
    reuse = worker.load().reuse
    return {
        "own": reuse.local_tokens / num_tokens,
        "DRAM": reuse.dram_tokens / num_tokens,
        "disk": reuse.disk_tokens / num_tokens,
    }


def _read_intervals(path: Path, during: Interval) -> dict[str, list[Interval]]:
    """Return the joined intervals by kind, of those within a time."""
    found: dict[str, list[Interval]] = {"read": [], "fetch": [], "step": []}
    for line in path.read_text().splitlines():
        kind, begin_s, end_s = json.loads(line)
        if during[0] <= begin_s and end_s <= during[1]:
            found[kind].append((begin_s, end_s))
    return {kind: _joined(intervals) for kind, intervals in found.items()}


def _joined(intervals: Iterable[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for begin_s, end_s in sorted(intervals):
        if joined and begin_s <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end_s))
        else:
            joined.append((begin_s, end_s))
    return joined


def _length(joined: Sequence[Interval]) -> float:
    return sum(end_s - begin_s for begin_s, end_s in joined)


def _bare(joined: Sequence[Interval], steps: Sequence[Interval]) -> float:
    """Return the share of a time in which no step ran."""
    if not joined:
        return 0.0
    either_s = _length(_joined([*joined, *steps]))
    return (either_s - _length(steps)) / _length(joined)


def show(name: str, found: Found) -> None:
    """Print a row of the table."""
    rates = " | ".join(f"{found.rates[tier]:.3f}" for tier in ("own", "DRAM", "disk"))
    print(
        f"| {name} | {rates} | {found.rate:.3f} | {found.rate / found.ideal:.3f} "
        f"| {found.bare_read:.2f} of {found.read_s:.1f} s | {found.bare_fetch:.2f} of {found.fetch_s:.1f} s "
        f"| {found.busy:.2f} | {1e3 * found.first_s:.0f} ms | {found.num_dropped} |",
        flush=True,
    )


def bench(trace: Path | None, num_requests: int, load: float, pairs: int, seed: int) -> list[Ratio]:
    """Replay with DRAM alone and with both tiers."""
    requests = read(trace) if trace else ()

    @cache
    def run(pair: int, *, has_disk: bool) -> Found:
        everything = requests or generate(pair)
        kept = conversations(everything, num_requests / len(everything), pair)
        found = play(kept, has_disk=has_disk, load=load, seed=pair)
        show(f"DRAM {DRAM:.0%}" + (f" and disk {DISK:.0%}" if has_disk else "") + f", {len(kept)} requests", found)
        return found

    def work() -> dict[str, float]:
        found = run(seed, has_disk=True)
        return {
            "ideal": round(found.ideal, 4),
            "of the READs' time not hidden": round(found.bare_read, 3),
            "of the fetches' time not hidden": round(found.bare_fetch, 3),
        }

    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    alone = ("DRAM alone", lambda pair: run(pair, has_disk=False).rate)
    both = ("DRAM and disk", lambda pair: run(pair, has_disk=True).rate)
    ideal = ("an infinite cache", lambda pair: run(pair, has_disk=True).ideal)
    what = f"hit rate of {trace.stem if trace else 'a generated trace'}"
    return [
        compare(what, baseline=baseline, candidate=both, pairs=pairs, seed=seed, unit="of all blocks", work=work)
        for baseline in (alone, ideal)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a file of Mooncake's format")
    parser.add_argument("--requests", type=int, default=1500, help="about how many to replay")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for ratio in bench(options.trace, options.requests, options.load, options.pairs, options.seed):
        report(ratio, options.results)
