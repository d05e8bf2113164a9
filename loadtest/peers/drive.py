"""Send requests to a server as a crowd of users would, and take the times of their tokens."""

import asyncio
import http
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools
import numpy as np
from workloads import Ask

TIMEOUT_S = 600.0
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


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
    """Run a workload against `url/v1/completions`, streaming, with a connection per request.

    Raises:
        RuntimeError: A request failed, or an answer has another number of tokens than was asked for.
    """
    waiting = list(reversed(asks))
    answers: list[Answer] = []

    async def user() -> None:
        while waiting:
            async with asyncio.timeout(TIMEOUT_S):
                answers.append(await _ask(url, model, waiting.pop()))

    begun_s = time.perf_counter()
    async with asyncio.TaskGroup() as crowd:
        for _ in range(users):
            crowd.create_task(user())
    return summarise(answers, time.perf_counter() - begun_s)


class _Events:
    """Takes the times of server-sent events as their bytes arrive; only the last, with the usage, is parsed.

    The client shares the machine's cores with the server it measures: what it computes per token it takes from that.
    """

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.begun_s = time.perf_counter()
        self.first_s, self.last_s, self.num_tokens = 0.0, 0.0, 0
        self.is_complete = False
        self._rest = b""

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if b'"choices":[{' in line or b'"choices": [{' in line:
                self.last_s = time.perf_counter() - self.begun_s
                self.first_s = self.first_s or self.last_s
            if b'"completion_tokens"' in line:
                self.num_tokens = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        self.is_complete = True


async def _ask(url: str, model: str, ask: Ask) -> Answer:
    body = json.dumps(
        {
            "model": model,
            "prompt": ask.prompt,
            "max_tokens": ask.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    events, received, address = _Events(), b"", urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(HEAD % len(body) + body)
        while not events.is_complete and (part := await reader.read(1 << 16)):
            received = part
            events.parser.feed_data(part)
    finally:
        writer.close()
    if events.parser.get_status_code() != http.HTTPStatus.OK:
        raise RuntimeError(f"status {events.parser.get_status_code()}: {received[-500:]!r}")
    if events.num_tokens != ask.num_tokens:
        raise RuntimeError(f"{events.num_tokens} tokens came, {ask.num_tokens} were asked for")
    return Answer(first_s=events.first_s, last_s=events.last_s, num_tokens=events.num_tokens)
