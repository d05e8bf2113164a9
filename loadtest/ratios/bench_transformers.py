"""One stream through the whole disaggregated HTTP path, against transformers' generate in bf16, on all cores."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from harness import compare, report
from measure import fresh_tokens
from transformers import AutoModelForCausalLM

from headrace.cli.layout import bundled_model
from headrace.testing.cluster import LocalCluster

PROMPT_TOKENS = 128
NUM_TOKENS = 128


def headrace_tpot(http: str, seed: int) -> float:
    """Return seconds per token after the first, over HTTP with server-sent events."""
    body = {
        "prompt": fresh_tokens(seed, PROMPT_TOKENS),
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first_s, last_s, num_tokens = None, 0.0, 0
    with httpx.stream("POST", f"{http}/v1/completions", json=body, timeout=120, trust_env=False) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
            if chunk["choices"]:
                last_s = time.perf_counter()
                first_s = first_s or last_s
    if num_tokens != NUM_TOKENS or first_s is None:
        raise RuntimeError(f"{num_tokens} tokens came, {NUM_TOKENS} were asked for")
    return (last_s - first_s) / (NUM_TOKENS - 1)


class Transformers:
    """The peer: the same file, dequantised to bf16, eager, static greedy generation."""

    def __init__(self, path: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)

    @torch.inference_mode()
    def tpot(self, seed: int) -> float:
        """Return seconds per token after the first."""
        prompt = torch.tensor([fresh_tokens(seed, PROMPT_TOKENS)])
        return (self._seconds(prompt, NUM_TOKENS) - self._seconds(prompt, 1)) / (NUM_TOKENS - 1)

    def _seconds(self, prompt: torch.Tensor, num_tokens: int) -> float:
        begun_s = time.perf_counter()
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )
        return time.perf_counter() - begun_s


def bench(pairs: int, seed: int, dtype: str, results: Path | None) -> None:
    """Print TPOT of headrace over TPOT of transformers."""
    peer = Transformers(bundled_model())
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder), dtype=dtype) as cluster:
        http = cluster.http
        headrace_tpot(http, seed - 1)
        peer.tpot(seed - 1)
        ratio = compare(
            f"time per token, one stream, {PROMPT_TOKENS} in, {NUM_TOKENS} out",
            baseline=("transformers generate in process, bf16", peer.tpot),
            candidate=(f"headrace P+D over HTTP, {dtype}", lambda pair: headrace_tpot(http, pair)),
            pairs=pairs,
            seed=seed,
        )
    report(ratio, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="bf16,auto", help="precisions of headrace, one ratio each")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for each in options.dtype.split(","):
        bench(options.pairs, options.seed, each, options.results)
