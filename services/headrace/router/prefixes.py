"""What the router asks of the kvstore's index. It is a hint: without an answer nobody holds anything."""

import logging
from collections.abc import Sequence

from headrace.clock import Clock
from headrace.core.block import BlockHash
from headrace.core.step_back import StepBack
from headrace.errors import HeadraceError
from headrace.runtime.channels import Channels, translate_errors
from headrace.v1 import kvstore_pb2, kvstore_pb2_grpc

logger = logging.getLogger(__name__)

MATCH_TIMEOUT_S = 0.2
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 8.0


class PrefixQueries:
    """Asks who holds how much of a prompt; a kvstore that stalls costs one request per pause its patience.

    Args:
        address: host:port of the kvstore.
        channels: gRPC channels by address.
        clock: Measures the pauses after failures.
    """

    def __init__(self, address: str, channels: Channels, clock: Clock) -> None:
        self._address = address
        self._channels = channels
        self._step_back = StepBack(clock, FIRST_PAUSE_S, LONGEST_PAUSE_S)

    async def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """Return how many leading blocks each location holds, by name."""
        if not hashes or not self._step_back.may_ask():
            return {}
        try:
            async with translate_errors(self._address):
                stub = kvstore_pb2_grpc.KvStoreServiceStub(self._channels.get(self._address))
                answer = await stub.Match(kvstore_pb2.MatchRequest(block_hashes=hashes), timeout=MATCH_TIMEOUT_S)
        except HeadraceError as error:
            self._step_back.note_failure()
            logger.info("kvstore not asked for a while", extra={"error": error.code})
            return {}
        self._step_back.note_answer()
        return {match.location: match.num_blocks for match in answer.matches}
