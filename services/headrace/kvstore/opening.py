"""Puts the parts together that a block size is needed for: the pool and the tiers. Moves nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.clock import Clock
from headrace.core.block import BlockHash, KvLayout
from headrace.errors import NotReady
from headrace.kvstore.config import KvStoreConfig
from headrace.kvstore.disk import DiskTier
from headrace.kvstore.disk_file import DiskSpace
from headrace.kvstore.errands import Errands
from headrace.kvstore.pool import NUM_CANARY_BLOCKS, BlockPool
from headrace.kvstore.shelf import Shelf
from headrace.kvstore.store import BlockStore
from headrace.kvstore.tiers import Tiers
from headrace.kvstore.worth import order_facts, order_of
from headrace.transfer.arena import map_blocks
from headrace.transfer.measure import NUM_SCRATCH_BLOCKS

NUM_KEPT_BLOCKS = NUM_SCRATCH_BLOCKS + NUM_CANARY_BLOCKS
"""Blocks at the end of the arena that no worker's block lies in: the canary's, then those of measurements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What is known of a store before its first worker comes.

    Attributes:
        epoch: Lifetime of the process.
        canary_hash: Name of the canary's block.
        open_disk: Makes a disk tier; tests pass one on a disk that fails.
    """

    config: KvStoreConfig
    epoch: str
    clock: Clock
    canary_hash: BlockHash
    open_disk: Callable[[DiskSpace], DiskTier]

    def num_blocks(self, layout: KvLayout) -> int:
        """Return how many blocks the memory holds, with those kept.

        Raises:
            NotReady: too few.
        """
        num_blocks = self.config.memory_bytes // layout.block_bytes
        if num_blocks <= NUM_KEPT_BLOCKS:
            raise NotReady(
                f"memory_bytes of {self.config.memory_bytes} holds {num_blocks} blocks of {layout.block_bytes} bytes; "
                f"{NUM_KEPT_BLOCKS} are kept for measurements and the canary",
                field="memory_bytes",
            )
        return num_blocks

    def memory(self, num_blocks: int, layout: KvLayout) -> NDArray[np.uint8]:
        """Map memory for `num_blocks`.

        Raises:
            NotReady: the system does not give that much.
        """
        try:
            return map_blocks(num_blocks, layout.block_bytes)
        except (OSError, OverflowError, ValueError) as error:
            reason = f"memory_bytes of {self.config.memory_bytes} cannot be mapped: {error}"
            raise NotReady(reason, field="memory_bytes") from error

    def pool(self, num_blocks: int, layout: KvLayout) -> BlockPool:
        """Return a pool of `num_blocks`, those kept included."""
        num_own, config, quotas = num_blocks - NUM_KEPT_BLOCKS, self.config, self.config.quotas
        workers = BlockStore(
            num_own,
            self.epoch,
            config.settle_s,
            order_of(config.eviction, layout, num_own),
            facts_of=partial(order_facts, block_tokens=layout.block_tokens),
            quota_of=lambda tenant: quotas.dram_blocks(tenant, layout.block_bytes),
        )
        return BlockPool(workers, BlockStore(NUM_CANARY_BLOCKS, self.epoch, config.settle_s), self.canary_hash)

    def tiers(
        self, folder: Path, layout: KvLayout, pool: BlockPool, memory: NDArray[np.uint8], errands: Errands
    ) -> Tiers:
        """Return the tiers, whose disk is not open yet.

        Raises:
            ConfigError: the disk tier holds no block.
        """
        config, quotas = self.config, self.config.quotas
        space = DiskSpace(
            folder=folder,
            block_bytes=layout.block_bytes,
            capacity_bytes=config.disk_bytes,
            # Models need no place in it: they are mixed into the names of their blocks.
            format_id=str(layout).encode(),
        )
        shelf = Shelf(
            order_of(config.eviction, layout, space.num_slots),
            partial(order_facts, block_tokens=layout.block_tokens),
            lambda tenant: quotas.disk_blocks(tenant, layout.block_bytes),
        )
        return Tiers(
            pool.workers,
            memory,
            self.open_disk(space),
            shelf,
            write=config.disk_write,
            errands=errands,
            clock=self.clock,
        )
