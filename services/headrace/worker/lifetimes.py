"""Whether the process that once answered at an address is gone: proven, never guessed from silence."""

import asyncio
import logging
from collections.abc import Callable

from headrace.errors import HeadraceError, PeerMismatch
from headrace.runtime.channels import Channels, translate_errors
from headrace.v1 import cluster_pb2, cluster_pb2_grpc

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 1.0
MAX_MET = 1024


class Lifetimes:
    """Tells a process that is gone from one that is merely out of reach.

    Two things prove an end: the address refuses connections, or another lifetime answers at it. Both hold
    because a worker closes its transport before it closes its port, and no two processes share a port. A
    timeout, a reset or an unreachable network prove nothing. Neither does a refusal at an address where the
    process was never met: that address may lead elsewhere.

    Args:
        channels: gRPC channels by address.
        introduce: Makes the handshake message of this process.
    """

    def __init__(self, channels: Channels, introduce: Callable[[], cluster_pb2.HandshakeRequest]) -> None:
        self._channels = channels
        self._introduce = introduce
        self._met: dict[tuple[str, str], None] = {}

    def note(self, address: str, epoch: str) -> None:
        """Take note that a lifetime has just answered at its address."""
        self._met[address, epoch] = None
        while len(self._met) > MAX_MET:
            del self._met[next(iter(self._met))]

    async def meet(self, address: str, epoch: str) -> bool:
        """Return whether a lifetime answered at its address, asking if nobody has; later proofs need it."""
        if (address, epoch) not in self._met and await self._epoch_at(address) == epoch:
            self.note(address, epoch)
        return (address, epoch) in self._met

    async def is_over(self, address: str, epoch: str) -> bool:
        """Return whether a lifetime that was met has provably ended; takes at most two probe timeouts."""
        if (address, epoch) not in self._met:
            await self.meet(address, epoch)
            return False
        if await _refuses_connections(address):
            return True
        found = await self._epoch_at(address)
        return found is not None and found != epoch

    async def _epoch_at(self, address: str) -> str | None:
        """Return the lifetime that answers; None when nobody does. One that refuses us is none we have met."""
        try:
            async with translate_errors(address):
                stub = cluster_pb2_grpc.ClusterServiceStub(self._channels.get(address))
                peer = await stub.Handshake(self._introduce(), timeout=PROBE_TIMEOUT_S)
        except PeerMismatch:
            return ""
        except HeadraceError as error:
            logger.info("no answer to a probe", extra={"address": address, "error": error.code})
            return None
        return str(peer.epoch)


async def _refuses_connections(address: str) -> bool:
    """Return whether the host answers that nothing listens; gRPC would mix that with other failures."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError, ValueError):
        return False
    writer.transport.abort()
    return False
