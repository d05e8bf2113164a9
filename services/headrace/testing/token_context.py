"""A client of `GenerateContext`: a context in tokens, fed by a test or a benchmark."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import grpc.aio

from headrace.runtime.channels import translate_errors
from headrace.v1 import generate_pb2, router_pb2, router_pb2_grpc


class TokenContext:
    """One context, greedy and without an early end.

    Args:
        channel: To a router.
        max_tokens: Length of the answer.
        timeout_s: Longest time for all of it.

    Attributes:
        tokens: Of the context so far.
        computed: For each version the most tokens that were reported as computed.
        arrived_s: When each token of the answer came, by `time.perf_counter`.
    """

    def __init__(self, channel: grpc.aio.Channel, *, max_tokens: int = 8, timeout_s: float = 120.0) -> None:
        self.tokens: tuple[int, ...] = ()
        self.answer: list[int] = []
        self.arrived_s: list[float] = []
        self.computed: dict[int, int] = {}
        self._version = 0
        self._sent: asyncio.Queue[router_pb2.GenerateContextRequest | None] = asyncio.Queue()
        self._progressed = asyncio.Event()
        opening = router_pb2.GenerateRequest()
        opening.sampling.max_tokens = max_tokens
        opening.sampling.ignore_eos = True
        self._sent.put_nowait(router_pb2.GenerateContextRequest(open=opening))
        stub = router_pb2_grpc.RouterServiceStub(channel)
        self._call = stub.GenerateContext(self._requests(), timeout=timeout_s)
        self._reading = asyncio.ensure_future(self._read())

    async def _requests(self) -> AsyncIterator[router_pb2.GenerateContextRequest]:
        while (request := await self._sent.get()) is not None:
            yield request

    async def _read(self) -> None:
        async with translate_errors("router"):
            async for response in self._call:
                if response.HasField("progress"):
                    progress = response.progress
                    self.computed[progress.version] = progress.computed_tokens
                    self._progressed.set()
                else:
                    now_s = time.perf_counter()
                    self.answer += [event.token_id for event in response.piece.events]
                    self.arrived_s += [now_s] * len(response.piece.events)

    def revise(self, tokens: Sequence[int] = (), keep: int | None = None, *, is_closed: bool = False) -> None:
        """Keep the first tokens, or all, and put others behind them."""
        keep = len(self.tokens) if keep is None else keep
        self.tokens = (*self.tokens[:keep], *tokens)
        self._version += 1
        revision = generate_pb2.ContextRevision(
            version=self._version, kept_tokens=keep, token_ids=tokens, is_closed=is_closed
        )
        self._sent.put_nowait(router_pb2.GenerateContextRequest(revision=revision))

    async def until_computed(self) -> None:
        """Wait until all of this version that may be computed is; raises what the call failed with."""
        while self.computed.get(self._version, 0) < len(self.tokens) - 1:
            if self._reading.done():
                self._reading.result()
                raise AssertionError("the call ended while its context was open")
            self._progressed.clear()
            waiting = asyncio.ensure_future(self._progressed.wait())
            await asyncio.wait([waiting, self._reading], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

    async def until_answered(self) -> list[int]:
        """Return the tokens of the answer, once all are there."""
        await self._reading
        return self.answer

    async def leave(self) -> None:
        """Cancel the call."""
        self._call.cancel()
        self._reading.cancel()
        await asyncio.wait([self._reading])
