"""Connections to other processes."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from headrace.core.status import CLIENT_OPTIONS, error_of
from headrace.errors import HeadraceError, PeerFailed, Saturated
from headrace.runtime.counted import CountedChannel

logger = logging.getLogger(__name__)

DEFAULT_MAX_CHANNELS = 256


class Channels:
    """Owns one channel per address; closed as a whole.

    When another address needs room, the channel that has been without calls for longest is closed. A stub of it
    that somebody kept fails like one of a peer that is gone; `get` makes a new channel.

    Deadlines are given per call: the `timeout` of a service config fires seconds too early
    (seen with grpcio 1.80 and 1.85).

    Args:
        max_channels: Most addresses; addresses come from peers, so their number must not be unbounded.
    """

    def __init__(self, max_channels: int = DEFAULT_MAX_CHANNELS) -> None:
        self._max_channels = max_channels
        self._channels: OrderedDict[str, CountedChannel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether all calls fail because this process is leaving."""
        return self._is_closed

    def get(self, address: str) -> grpc.aio.Channel:
        """Return the channel to `host:port`, making it at first use; it connects by itself.

        Raises:
            Saturated: too many addresses, all with calls in flight.
            PeerFailed: the pool is closed.
        """
        channel = self._channels.get(address)
        if channel is not None:
            self._channels.move_to_end(address)
            return channel
        if self._is_closed:
            raise PeerFailed(f"no new connection to {address}: this process is leaving")
        if len(self._channels) >= self._max_channels:
            self._make_room(address)

        def on_use() -> None:
            if self._channels.get(address) is channel:
                self._channels.move_to_end(address)

        channel = CountedChannel(grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS), on_use)
        self._channels[address] = channel
        return channel

    async def drop(self, address: str) -> None:
        """Close the channel to an address that is not used any more; its calls fail."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Close all channels; calls in flight raise PeerFailed under `translate_errors`."""
        self._is_closed = True
        channels = tuple(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)

    def _make_room(self, address: str) -> None:
        idle = next((known for known, channel in self._channels.items() if not channel.num_calls), None)
        if idle is None:
            raise Saturated(
                f"no connection to {address}: {len(self._channels)} peers are connected and in use",
                limit=str(self._max_channels),
            )
        logger.info("idle connection closed", extra={"address": idle})
        closing = asyncio.get_running_loop().create_task(self._channels.pop(idle).close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def __aenter__(self) -> "Channels":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def to_headrace_error(error: grpc.aio.AioRpcError, peer: str = "") -> HeadraceError:
    """Return the error that a failed call stands for; without our detail it is judged by its code."""
    return error_of(error.code().name, error.details() or "", error.trailing_metadata() or (), peer)


@asynccontextmanager
async def translate_errors(peer: str) -> AsyncIterator[None]:
    """Turn failures of calls to `peer` into HeadraceErrors.

    Raises:
        HeadraceError: the call failed; UNAVAILABLE without detail is PeerFailed.
        asyncio.CancelledError: the calling task was cancelled.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise to_headrace_error(error, peer) from None
    except grpc.aio.UsageError as error:
        if "closed" not in str(error):
            raise
        raise PeerFailed(f"connection to {peer} is closed: {error}", worker=peer) from None
    except asyncio.CancelledError:
        # gRPC raises CancelledError into a caller whose channel was closed under it; nobody cancelled the task.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise PeerFailed(f"connection to {peer} was closed during the call", worker=peer) from None
