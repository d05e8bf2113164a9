"""Send requests to a server as a crowd of users would, and take the times of their tokens."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from workloads import Ask

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Times of one answer in seconds after its request was sent."""

    first_s: float
    last_s: float
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        """Time per token after the first."""
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What users see of one run of a workload; smaller is better in all of them."""

    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    total_s: float
    s_per_token: float


def summarise(answers: Sequence[Answer], total_s: float) -> Figures:
    """Return the figures of a run that took `total_s`."""
    ttft = np.array([answer.first_s for answer in answers])
    tpot = np.array([answer.tpot_s for answer in answers])
    return Figures(
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p95_s=float(np.percentile(ttft, 95)),
        tpot_p50_s=float(np.percentile(tpot, 50)),
        tpot_p95_s=float(np.percentile(tpot, 95)),
        total_s=total_s,
        s_per_token=total_s / sum(answer.num_tokens for answer in answers),
    )


async def drive(url: str, model: str, asks: Sequence[Ask], users: int) -> Figures:
    """Run a workload against `url/v1/completions`, streaming.

    Raises:
        RuntimeError: An answer has another number of tokens than was asked for.
    """
    waiting = list(reversed(asks))
    answers: list[Answer] = []
    limits = httpx.Limits(max_connections=users)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:

        async def user() -> None:
            while waiting:
                answers.append(await _ask(client, url, model, waiting.pop()))

        begun_s = time.perf_counter()
        async with asyncio.TaskGroup() as crowd:
            for _ in range(users):
                crowd.create_task(user())
        return summarise(answers, time.perf_counter() - begun_s)


async def _ask(client: httpx.AsyncClient, url: str, model: str, ask: Ask) -> Answer:
    body = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun_s = time.perf_counter()
    first_s, last_s, num_tokens = 0.0, 0.0, 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line[6:])
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
            if chunk["choices"]:
                last_s = time.perf_counter() - begun_s
                first_s = first_s or last_s
    if num_tokens != ask.num_tokens:
        raise RuntimeError(f"{num_tokens} tokens came, {ask.num_tokens} were asked for")
    return Answer(first_s=first_s, last_s=last_s, num_tokens=num_tokens)
