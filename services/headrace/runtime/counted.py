"""A channel that knows how many calls are in flight on it."""

from collections.abc import Callable
from typing import Any, cast

import grpc
import grpc.aio


class CountedChannel(grpc.aio.Channel):
    """Passes everything on to a channel and counts its calls.

    Args:
        channel: Does the work; owned by this one.
        on_use: Called when a call begins and when one ends.

    Attributes:
        num_calls: Calls that have begun and not ended.
    """

    def __init__(self, channel: grpc.aio.Channel, on_use: Callable[[], None]) -> None:
        self.num_calls = 0
        self._channel = channel
        self._on_use = on_use

    def unary_unary(self, *args: Any, **kwargs: Any) -> grpc.aio.UnaryUnaryMultiCallable[Any, Any]:  # noqa: ANN401
        """Return a method of one request and one response."""
        made = self._counted(self._channel.unary_unary(*args, **kwargs))
        return cast("grpc.aio.UnaryUnaryMultiCallable[Any, Any]", made)

    def unary_stream(self, *args: Any, **kwargs: Any) -> grpc.aio.UnaryStreamMultiCallable[Any, Any]:  # noqa: ANN401
        """Return a method of one request and many responses."""
        made = self._counted(self._channel.unary_stream(*args, **kwargs))
        return cast("grpc.aio.UnaryStreamMultiCallable[Any, Any]", made)

    def stream_unary(self, *args: Any, **kwargs: Any) -> grpc.aio.StreamUnaryMultiCallable[Any, Any]:  # noqa: ANN401
        """Return a method of many requests and one response."""
        made = self._counted(self._channel.stream_unary(*args, **kwargs))
        return cast("grpc.aio.StreamUnaryMultiCallable[Any, Any]", made)

    def stream_stream(self, *args: Any, **kwargs: Any) -> grpc.aio.StreamStreamMultiCallable[Any, Any]:  # noqa: ANN401
        """Return a method of many requests and many responses."""
        made = self._counted(self._channel.stream_stream(*args, **kwargs))
        return cast("grpc.aio.StreamStreamMultiCallable[Any, Any]", made)

    async def close(self, grace: float | None = None) -> None:
        """Close the channel; its calls are cancelled after `grace` seconds, at once without."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 gRPC's own
        """Return the state of the connection."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the connection is in another state."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the connection is there."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> "CountedChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _counted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 any call of any message
            call = make(*args, **kwargs)
            self.num_calls += 1
            self._on_use()
            call.add_done_callback(self._end)
            return call

        return begin

    def _end(self, _: object) -> None:
        self.num_calls -= 1
        self._on_use()
