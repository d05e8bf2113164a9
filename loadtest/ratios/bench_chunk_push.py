"""Push KV chunk by chunk while the next chunk computes, against one push after the whole prompt."""

import argparse
import tempfile
from pathlib import Path

from harness import compare, report
from measure import fresh_tokens, seconds_to_token

from headrace.testing.cluster import LocalCluster

PROMPT_TOKENS = 2048


def bench(pairs: int, seed: int, lane: str, results: Path | None) -> None:
    """Time the second token of a 2k prompt: the first that needs all KV on the decode worker."""
    env = {"UCX_TLS": lane} if lane else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder, "chunks"), dtype="bf16", env=env) as chunks,
        LocalCluster(Path(folder, "whole"), dtype="bf16", settings=("worker.push_whole=true",), env=env) as whole,
    ):
        for cluster in (chunks, whole):
            seconds_to_token(cluster.grpc, fresh_tokens(seed - 1, PROMPT_TOKENS), 1)
        ratio = compare(
            f"second token of a {PROMPT_TOKENS}-token prompt, lane {lane or 'default'}, bf16",
            baseline=("push after the prompt", lambda s: seconds_to_token(whole.grpc, fresh_tokens(s, 2048), 1)),
            candidate=("push by chunks", lambda s: seconds_to_token(chunks.grpc, fresh_tokens(s, 2048), 1)),
            pairs=pairs,
            seed=seed,
        )
    report(ratio, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for lane in ("", "tcp"):
        bench(options.pairs, options.seed, lane, options.results)
