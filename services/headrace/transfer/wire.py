"""Translate pool descriptors between the wire and this package."""

from headrace.transfer.connector import PoolDescriptor
from headrace.v1 import block_pb2


def pool_to_proto(pool: PoolDescriptor) -> block_pb2.TransferPool:
    """Write a pool descriptor."""
    return block_pb2.TransferPool(
        agent_name=pool.agent_name,
        agent_metadata=pool.agent_metadata,
        base_address=pool.base_address,
        block_bytes=pool.block_bytes,
        num_blocks=pool.num_blocks,
        device_id=pool.device_id,
        epoch=pool.epoch,
    )


def pool_from_proto(message: block_pb2.TransferPool) -> PoolDescriptor:
    """Read a pool descriptor."""
    return PoolDescriptor(
        agent_name=message.agent_name,
        agent_metadata=message.agent_metadata,
        base_address=message.base_address,
        block_bytes=message.block_bytes,
        num_blocks=message.num_blocks,
        device_id=message.device_id,
        epoch=message.epoch,
    )
