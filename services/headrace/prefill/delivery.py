"""One attempt to fill the blocks that a decode worker has reserved."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from headrace.core.block import BlockId
from headrace.errors import BlockLost, DeadlineExceeded, HeadraceError, PeerFailed
from headrace.prefill.parts import PrefillParts
from headrace.runtime.channels import translate_errors
from headrace.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 5.0
REPORT_PAUSES_S = (0.0, 0.5, 2.0)
"""Before each try to report a failure; while none arrives, the decode worker keeps the blocks out of use."""


class Delivery:
    """Writes into a reservation, and tells its owner once that nothing more is written: by a commit, or by a failure.

    Args:
        parts: What the jobs of a worker share.
        target: The reservation.
        writer_id: Name of this attempt.
        deadline_unix_ms: Of the request.

    Attributes:
        target: The reservation; its blocks may become more.
        writer_id: Name of this attempt.
        num_pushed_blocks: Blocks written so far.
        sources: Own blocks that were written from: a write that ran out of time may still read them.
    """

    def __init__(
        self, parts: PrefillParts, target: prefill_pb2.PrefillTarget, writer_id: str, deadline_unix_ms: int
    ) -> None:
        self.target = target
        self.writer_id = writer_id
        self.num_pushed_blocks = 0
        self.sources: set[BlockId] = set()
        self._parts = parts
        self._deadline_unix_ms = deadline_unix_ms
        self._agent = ""

    async def connect(self) -> None:
        """Meet the decode worker."""
        peer = await self._parts.peers.ensure(self.target.address, self.target.lease.epoch)
        self._agent = peer.pool.agent_name
        self._parts.lifetimes.note(self.target.address, peer.epoch)

    async def begin(self) -> None:
        """Announce the writer.

        Raises:
            BlockLost: the sequence does not wait for it any more.
        """
        lease = self.target.lease
        begin = decode_pb2.BeginWriteRequest(
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            writer_id=self.writer_id,
            writer_address=self._parts.address,
            writer_epoch=self._parts.epoch,
        )
        async with translate_errors(self.target.address):
            answer = await self._stub().BeginWrite(begin, timeout=CONTROL_TIMEOUT_S)
        if not answer.is_accepted:
            raise BlockLost("the decode worker no longer holds the reservation: open a new one")

    async def write(self, blocks: Sequence[BlockId], first: int) -> None:
        """Write blocks into the reserved ones, from the one with index `first` on."""
        remote = self.target.lease.block_ids[first : first + len(blocks)]
        deadline_s = self._write_deadline_s()
        if deadline_s <= self._parts.clock.now():
            # The decode worker counts on it when it takes blocks back from a writer that it hears nothing of.
            raise DeadlineExceeded("the lease has ended: nothing may be written into its blocks any more")
        self.sources.update(blocks)
        try:
            await self._parts.connector.write(self._agent, blocks, remote, deadline_s)
        except PeerFailed:
            await self._parts.peers.forget(self.target.address, self.target.lease.epoch)
            raise
        self.num_pushed_blocks += len(blocks)

    async def commit(self, first: decode_pb2.FirstToken) -> None:
        """Hand over the first token; the KV before it has landed."""
        with self.peer_to_blame():
            await self._send(decode_pb2.CommitPrefillRequest(first_token=first))

    @contextmanager
    def peer_to_blame(self) -> Iterator[None]:
        """Turn an end of our patience into the peer's failure: while the request has time, another can serve it."""
        try:
            yield
        except DeadlineExceeded as error:
            if self._left_s(self._deadline_unix_ms) <= 0:
                raise
            address = self.target.address
            raise PeerFailed(f"the decode worker at {address} did not answer in time", worker=address) from error

    def fail_when_settled(self, reason: str) -> None:
        """Report once nothing is written any more: a write that ran out of time may still land."""
        self._parts.connector.when_settled(tuple(self.sources), lambda: self._report_later(reason))

    def _report_later(self, reason: str) -> None:
        report = self._report_failure(reason)
        try:
            self._parts.tasks.create_task(report)
        except RuntimeError:  # The worker is leaving: that its process is gone tells as much.
            report.close()

    async def _report_failure(self, reason: str) -> None:
        parts, target = self._parts, self.target
        for pause_s in REPORT_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                await self._send(decode_pb2.CommitPrefillRequest(failure=reason))
            except HeadraceError as error:
                logger.info("decode worker not told of a failed prefill", extra={"error": error.code})
            else:
                return
            if parts.channels.is_closed or await parts.lifetimes.is_over(target.address, target.lease.epoch):
                return

    async def _send(self, commit: decode_pb2.CommitPrefillRequest) -> None:
        commit.lease_id = self.target.lease.lease_id
        commit.epoch = self.target.lease.epoch
        commit.writer_id = self.writer_id
        async with translate_errors(self.target.address):
            await self._stub().CommitPrefill(commit, timeout=CONTROL_TIMEOUT_S)

    def _stub(self) -> "decode_pb2_grpc.DecodeServiceAsyncStub":
        return decode_pb2_grpc.DecodeServiceStub(self._parts.channels.get(self.target.address))

    def _write_deadline_s(self) -> float:
        """Return when a write that begins now is given up: nothing of it is posted later."""
        lease_s = self._left_s(self.target.lease.deadline_unix_ms)
        left_s = min(self._left_s(self._deadline_unix_ms), lease_s, self._parts.transfer_deadline_s)
        return self._parts.clock.now() + left_s

    def _left_s(self, deadline_unix_ms: int) -> float:
        return (deadline_unix_ms - self._parts.clock.unix_ms()) / 1000
