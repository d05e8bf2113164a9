"""IndexService on the wire: describes a process's copy of the index."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio

from headrace.core.placement import Tier
from headrace.index.copy import IndexCopy
from headrace.index.prefix_index import LocationState
from headrace.index.replica import FollowedLocation
from headrace.v1 import index_pb2, index_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """What a router compares: tokens that the index promised and that were found.

    Attributes:
        drift: Share by which the two differ lately.
        drift_alarm: Share from which on that is an alarm.
    """

    predicted_tokens: int
    actual_tokens: int
    drift: float
    drift_alarm: float


class IndexServicer(index_pb2_grpc.IndexServiceServicer):
    """Describes a copy of the index.

    Args:
        name: Of the process.
        copy: None where the process has none.
        hits: Returns what a router compares; None for others.
    """

    def __init__(self, name: str, copy: IndexCopy | None, hits: Callable[[], Hits] | None = None) -> None:
        self._name = name
        self._copy = copy
        self._hits = hits

    async def DescribeIndex(
        self, request: index_pb2.DescribeIndexRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> index_pb2.DescribeIndexResponse:
        """Describe the copy: who is in it, how current it is, how large."""
        answer = index_pb2.DescribeIndexResponse(name=self._name)
        if self._copy is None:
            answer.problem = "redis.url is not set: there is no shared index"
        else:
            _describe(self._copy, answer)
        if self._hits is not None:
            hits = self._hits()
            answer.predicted_tokens, answer.actual_tokens = hits.predicted_tokens, hits.actual_tokens
            answer.drift, answer.drift_alarm = hits.drift, hits.drift_alarm
        return answer


def _describe(copy: IndexCopy, answer: index_pb2.DescribeIndexResponse) -> None:
    index, state = copy.index, copy.replica.state()
    answer.is_connected, answer.is_synced, answer.problem = state.is_connected, state.is_synced, state.problem
    answer.num_blocks, answer.memory_bytes = index.num_blocks, index.memory_bytes
    answer.budget_bytes, answer.num_evicted = index.budget_bytes, index.num_evicted
    answer.num_gaps, answer.num_events, answer.num_fenced = state.num_gaps, state.num_events, state.num_fenced
    fresh = {location.name: location for location in state.locations}
    answer.locations.extend(_location(location, fresh.get(location.name)) for location in index.locations())


def _location(location: LocationState, fresh: FollowedLocation | None) -> index_pb2.IndexLocation:
    return index_pb2.IndexLocation(
        name=location.name,
        epoch=location.epoch,
        next_sequence=location.next_sequence,
        num_device_blocks=location.num_blocks.get(Tier.DEVICE, 0),
        num_dram_blocks=location.num_blocks.get(Tier.DRAM, 0),
        num_disk_blocks=location.num_blocks.get(Tier.DISK, 0),
        is_resyncing=location.is_resyncing,
        age_ms=0 if fresh is None else int(fresh.age_s * 1000),
    )
