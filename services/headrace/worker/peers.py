"""Connections to the pools of other processes."""

import asyncio
import logging
from collections.abc import Callable

from headrace.errors import DeadlineExceeded, PeerFailed
from headrace.runtime.channels import Channels, translate_errors
from headrace.runtime.cluster import check_peer
from headrace.transfer.connector import Connector
from headrace.transfer.wire import pool_from_proto
from headrace.v1 import cluster_pb2, cluster_pb2_grpc

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0


class Peers:
    """Knows which transfer agent answers at which address; one connection per peer and epoch.

    Args:
        connector: Gets the pools of peers.
        channels: gRPC channels by address.
        introduce: Makes the handshake message of this process.
        fingerprint: Model fingerprint that peers with a model must share.
    """

    def __init__(
        self,
        connector: Connector,
        channels: Channels,
        introduce: Callable[[], cluster_pb2.HandshakeRequest],
        fingerprint: str,
    ) -> None:
        self._connector = connector
        self._channels = channels
        self._introduce = introduce
        self._fingerprint = fingerprint
        self._known: dict[str, cluster_pb2.HandshakeResponse] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def ensure(self, address: str, epoch: str | None = None) -> cluster_pb2.HandshakeResponse:
        """Return the peer at `address`, connecting if it is new or was reborn.

        Args:
            address: host:port of its gRPC server.
            epoch: Lifetime the caller expects; None takes whichever runs.

        Raises:
            PeerFailed: it cannot be reached, or is no longer of that epoch.
            PeerMismatch: it speaks another protocol version or serves another model.
        """
        async with self._locks.setdefault(address, asyncio.Lock()):
            known = self._known.get(address)
            if known is not None and epoch in (None, known.epoch):
                return known
            peer = await self.handshake(address)
            if epoch is not None and peer.epoch != epoch:
                raise PeerFailed(f"peer at {address} was restarted: wanted epoch {epoch}, found {peer.epoch}")
            await self._drop(address)
            if peer.HasField("pool"):
                await self._connector.add_peer(pool_from_proto(peer.pool))
            self._known[address] = peer
            logger.info("peer connected", extra={"peer": peer.name, "address": address, "epoch": peer.epoch})
            return peer

    async def refresh(self, address: str) -> cluster_pb2.HandshakeResponse:
        """Return the peer that runs at `address` now; one that was reborn unnoticed is met anew.

        Raises:
            PeerFailed, PeerMismatch: as `ensure`.
        """
        running = await self.handshake(address)
        return await self.ensure(address, running.epoch)

    async def handshake(self, address: str) -> cluster_pb2.HandshakeResponse:
        """Introduce this process and check what answers."""
        stub = cluster_pb2_grpc.ClusterServiceStub(self._channels.get(address))
        try:
            async with translate_errors(address):
                peer = await stub.Handshake(self._introduce(), timeout=HANDSHAKE_TIMEOUT_S)
        except DeadlineExceeded:
            # Our own patience, not a request's deadline: the request may still be served elsewhere.
            raise PeerFailed(f"{address} did not answer within {HANDSHAKE_TIMEOUT_S} s", worker=address) from None
        check_peer(peer, self._fingerprint)
        return peer

    async def forget(self, address: str, epoch: str | None = None) -> None:
        """Drop a peer whose process is gone; the next `ensure` meets it anew.

        Args:
            address: host:port of its gRPC server.
            epoch: The lifetime that is over; a peer met since is kept. None drops whichever is known.
        """
        lock = self._locks.setdefault(address, asyncio.Lock())
        if lock.locked():
            return  # It is being met anew.
        async with lock:
            known = self._known.get(address)
            if known is not None and epoch in (None, known.epoch):
                await self._drop(address)

    async def _drop(self, address: str) -> None:
        known = self._known.pop(address, None)
        if known is not None and known.HasField("pool"):
            await self._connector.remove_peer(known.pool.agent_name)
