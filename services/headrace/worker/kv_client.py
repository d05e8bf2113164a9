"""What a process asks of one kvstore. The store is a cache: when it fails, that is a miss."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from headrace.core.block import BlockHash, BlockId
from headrace.core.put_facts import PutFacts
from headrace.core.wire import layout_to_proto, write_facts
from headrace.errors import BlockLost, HeadraceError
from headrace.v1 import block_pb2, kvstore_pb2
from headrace.worker.digests import BlockDigests
from headrace.worker.pool_link import CONTROL_TIMEOUT_S, PoolLink
from headrace.worker.pool_reader import PoolReader, ReadTerms, Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """Own full blocks to write; they must stay as they are meanwhile.

    Attributes:
        hashes: Their names, in order.
        local_ids: As many own blocks.
        facts: What is said of them.
        digests: Theirs, where they are known; None takes them.
    """

    hashes: Sequence[BlockHash]
    local_ids: Sequence[BlockId]
    facts: PutFacts = PutFacts()
    digests: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What became of a put; what is neither new nor refused the store had, or gets from others.

    Attributes:
        num_new: Blocks that became visible.
        num_refused: Blocks for which there was no room.
    """

    num_new: int = 0
    num_refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PutTerms:
    """How to write.

    Attributes:
        deadline_s: When it is given up, on the own clock.
        group_blocks: Most blocks of one WRITE; None writes all at once.
        before_write: Awaited before each WRITE, with its number of blocks.
        after_write: Hears a WRITE's number of blocks and its seconds.
    """

    deadline_s: float
    group_blocks: int | None = None
    before_write: Callable[[int], Awaitable[None]] | None = None
    after_write: Callable[[int, float], None] = lambda _, __: None


class KvClient:
    """Dealings with one kvstore. Every wait has a limit.

    Args:
        link: The way to the store.
        digests: Takes those of written blocks and checks those of read ones.

    Attributes:
        link: As given.
        reader: Reads from the store.
        num_stored_blocks: Blocks that became visible by puts from here.
    """

    def __init__(self, link: PoolLink, digests: BlockDigests) -> None:
        self.link = link
        self.reader = PoolReader(link, digests)
        self.num_stored_blocks = 0
        self._digests = digests

    async def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Return how many leading blocks each location holds; nobody holds any when the store does not answer."""
        nobody: dict[str, int] = {}
        return await self.link.attempt("match", lambda: self._match(hashes), nobody)

    async def fetch(
        self, hashes: Sequence[BlockHash], local_ids: Sequence[BlockId], deadline_s: float, tenant: str = ""
    ) -> int:
        """Read the longest stored prefix into own blocks, in one READ.

        Args:
            hashes: Names of the blocks, in order.
            local_ids: Own blocks to fill.
            deadline_s: On the own clock.
            tenant: Whose blocks they are.

        Returns:
            Leading blocks that have landed; 0 is a miss, whatever its cause.

        Raises:
            BlockLost: the read did not end in time and may still write into `local_ids`.
        """
        wanted = Wanted(hashes=tuple(hashes), local_ids=tuple(local_ids), tenant=tenant)
        terms = ReadTerms(
            lease_end_s=deadline_s,
            answer_by_s=deadline_s,
            group_blocks=len(wanted.hashes),
            deadline_s=lambda _: deadline_s,
        )
        found = await self.reader.read(wanted, terms)
        if not found.num_landed and not self.link.is_settled(wanted.local_ids):
            raise BlockLost("a read from the kvstore did not end in time and may still write into these blocks")
        return found.num_landed

    async def store(self, hashes: Sequence[BlockHash], local_ids: Sequence[BlockId], deadline_s: float) -> int:
        """Write own full public blocks that the store does not have; returns how many became visible."""
        stored = await self.put(Put(hashes=hashes, local_ids=local_ids), PutTerms(deadline_s=deadline_s))
        return 0 if stored is None else stored.num_new

    async def put(self, put: Put, terms: PutTerms) -> Stored | None:
        """Write blocks that the store does not have; those it has are not moved.

        Returns:
            What became of them; None when the store failed or is left alone.
        """
        failed: Stored | None = None
        stored = await self.link.attempt("store", lambda: self._put(put, terms), failed)
        self.num_stored_blocks += 0 if stored is None else stored.num_new
        return stored

    async def _match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        request = kvstore_pb2.MatchRequest(block_hashes=hashes)
        answer = await self.link.store_stub().Match(request, timeout=CONTROL_TIMEOUT_S)
        return {match.location: match.num_blocks for match in answer.matches}

    async def _put(self, put: Put, terms: PutTerms) -> Stored | None:
        await self.link.meet()
        reserved = await self._reserve(put, terms.deadline_s)
        if not reserved.indices:
            return Stored(num_refused=reserved.num_refused)
        hashes = [put.hashes[index] for index in reserved.indices]
        local_ids = [put.local_ids[index] for index in reserved.indices]
        lease, tenant = reserved.lease, put.facts.tenant
        request = kvstore_pb2.CommitPutRequest(lease_id=lease.lease_id, epoch=lease.epoch, tenant=tenant)
        try:
            if put.digests is None:
                request.digests.extend(await self._digests.take(hashes, local_ids))
            else:
                request.digests.extend(put.digests[index] for index in reserved.indices)
            await self._write(lease, local_ids, terms)
        except (HeadraceError, TimeoutError):
            # A revocation says that nothing is written any more. While something may be, the store's clock ends it.
            if self.link.is_settled(local_ids):
                del request.digests[:]
                await self._commit(request)
            raise
        request.is_complete = True
        return Stored(num_new=await self._commit(request), num_refused=reserved.num_refused)

    async def _reserve(self, put: Put, deadline_s: float) -> kvstore_pb2.ReservePutResponse:
        caller = self.link.parts.caller
        request = kvstore_pb2.ReservePutRequest(
            block_hashes=put.hashes,
            layout=layout_to_proto(caller.layout),
            model_fingerprint=caller.fingerprint,
            writer=caller.name,
            writer_epoch=caller.epoch,
            deadline_unix_ms=self.link.unix_ms(deadline_s),
        )
        write_facts(request, put.facts)
        return await self.link.store_stub().ReservePut(request, timeout=CONTROL_TIMEOUT_S)

    async def _write(self, lease: block_pb2.BlockLease, local_ids: Sequence[BlockId], terms: PutTerms) -> None:
        agent, parts = await self.link.agent(lease.epoch), self.link.parts
        size = terms.group_blocks or len(local_ids)
        # The store may have granted less time than was asked for; behind its end the blocks may be another's.
        deadline_s = min(terms.deadline_s, self.link.own_s(lease.deadline_unix_ms))
        for start in range(0, len(local_ids), size):
            group = local_ids[start : start + size]
            if terms.before_write is not None:
                await terms.before_write(len(group))
            begun_s = parts.clock.now()
            await parts.connector.write(agent, group, lease.block_ids[start : start + size], deadline_s)
            terms.after_write(len(group), parts.clock.now() - begun_s)

    async def _commit(self, request: kvstore_pb2.CommitPutRequest) -> int:
        answer = await self.link.store_stub().CommitPut(request, timeout=CONTROL_TIMEOUT_S)
        return answer.num_committed
