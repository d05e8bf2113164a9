"""Read blocks from another process's pool by NIXL, against one thread that copies the same bytes in its own memory."""

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from harness import Ratio, compare, report

from headrace.clock import WallClock
from headrace.testing.transfer_peer import TransferPeer
from headrace.transfer.agent import Transport
from headrace.transfer.arena import arena_of, map_blocks
from headrace.transfer.nixl import NixlConnector

BLOCK_BYTES = 30 * 2 * 16 * 3 * 64 * 2
BLOCK_TOKENS = 16
PROMPTS = (2048, 8192)
LIMIT_S = 30.0


def bench(num_tokens: int, lane: str, pairs: int, seed: int) -> Ratio:
    """Compare both ways for the blocks of a prompt, whose places in both pools are shuffled."""
    num_blocks = num_tokens // BLOCK_TOKENS
    own, source = map_blocks(num_blocks, BLOCK_BYTES), map_blocks(num_blocks, BLOCK_BYTES)
    source[:] = 1
    env = {"UCX_TLS": lane} if lane else {}
    with TransferPeer(num_blocks, BLOCK_BYTES, env) as peer, asyncio.Runner() as runner:
        for block in range(num_blocks):
            peer.fill(block, 2)
        clock = WallClock()
        connector = NixlConnector(Transport(f"bench-{time.monotonic_ns()}"), arena_of(own), "bench", clock)
        runner.run(connector.add_peer(peer.pool))
        remote_agent = peer.pool.agent_name

        def fetch(pair: int) -> float:
            local, remote = _places(pair, num_blocks)
            begun_s = time.perf_counter()
            runner.run(connector.read(remote_agent, local, remote, clock.now() + LIMIT_S))
            took_s = time.perf_counter() - begun_s
            if not (own == 2).all():
                raise RuntimeError("the blocks did not arrive")
            return took_s

        def copy(pair: int) -> float:
            local, remote = _places(pair, num_blocks)
            begun_s = time.perf_counter()
            for target, origin in zip(local, remote, strict=True):
                own[target] = source[origin]
            return time.perf_counter() - begun_s

        fetch(seed)
        copy(seed)
        ratio = compare(
            f"{num_tokens} tokens of KV, {num_blocks} blocks of {BLOCK_BYTES} bytes, lane {lane or 'default'}",
            baseline=("copy by one thread", copy),
            candidate=("read by NIXL", fetch),
            pairs=pairs,
            seed=seed,
            work=lambda: {"bytes": float(num_blocks * BLOCK_BYTES)},
        )
        runner.run(connector.close())
    return ratio


def _places(seed: int, num_blocks: int) -> tuple[Sequence[int], Sequence[int]]:
    generator = np.random.default_rng(seed)
    return generator.permutation(num_blocks).tolist(), generator.permutation(num_blocks).tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for tokens in PROMPTS:
        for name in ("", "tcp"):
            report(bench(tokens, name, options.pairs, options.seed), options.results)
