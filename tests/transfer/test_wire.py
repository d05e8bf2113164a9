"""Pool descriptors cross the wire unchanged."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.transfer.connector import PoolDescriptor
from headrace.transfer.wire import pool_from_proto, pool_to_proto
from headrace.v1 import block_pb2

POOLS = st.builds(
    PoolDescriptor,
    agent_name=st.text(),
    agent_metadata=st.binary(),
    base_address=st.integers(0, 2**64 - 1),
    block_bytes=st.integers(0, 2**64 - 1),
    num_blocks=st.integers(0, 2**32 - 1),
    device_id=st.integers(0, 2**32 - 1),
    epoch=st.text(),
)


@given(POOLS)
def test_a_pool_comes_back_as_it_went(pool):
    wired = block_pb2.TransferPool.FromString(pool_to_proto(pool).SerializeToString())
    assert pool_from_proto(wired) == pool
