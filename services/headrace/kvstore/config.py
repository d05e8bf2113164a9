"""Settings of the kvstore."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

from headrace.core.addresses import check_addresses, check_name
from headrace.errors import ConfigError
from headrace.index.config import IndexConfig, VllmFeedsConfig
from headrace.index.connection import RedisConfig
from headrace.kvstore.quotas import Quota, Quotas, parse_quotas
from headrace.settings import Between, Count, Port

_Bytes = Annotated[int, Between(0)]


class Eviction(Enum):
    """Which block a full tier forgets first."""

    VALUE = "value"
    """What saves the least recomputing, weighted by the chance that it is wanted again."""
    S3FIFO = "s3fifo"
    LRU = "lru"


class DiskWrite(Enum):
    """When a block is written to disk."""

    THROUGH = "through"
    """Soon after it came."""
    BACK = "back"
    """When memory becomes short, before it is forgotten there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig:
    """Settings of the kvstore.

    Attributes:
        name: Unique in the cluster; also the name of the store's own location in the index.
        host: Address the gRPC server binds.
        grpc_port: Port of the gRPC server.
        memory_bytes: Size of the block pool; mapped when the first worker tells its block size.
        eviction: Which block memory and disk forget first.
        tenant_dram_bytes: Memory that one tenant's blocks may take; 0 is no limit, and public blocks have none.
        tenant_disk_bytes: Disk that one tenant's blocks may take; 0 is no limit.
        tenant_quotas: Other limits of single tenants, each `NAME=DRAM_BYTES:DISK_BYTES`.
        disk_dir: Folder of disk tiers, in which each store has one of its name; none is no disk tier.
        disk_bytes: Size of the disk tier.
        disk_write: Whether blocks are written to disk when they come, or when memory becomes short.
        redis: Where the log of the shared index is; without its URL the store knows its own blocks only.
        index: The store's copy of the index.
        vllm_feeds: Engines that are none of ours; the store tells the index what they hold.
        siblings: Addresses of the other kvstores, as workers write them; they get the blocks of one that leaves.
        handover_s: How long a store that was not told how long it has hands its blocks over.
        max_hashes: Most block hashes of one call.
        max_workers: Most processes whose restarts are noticed.
        max_lease_s: Longest lease; a longer one asked for is cut.
        settle_s: How long after the end of its lease a silent writer is still believed to write.
        mailbox: Most calls that wait.
        exit_with_parent: End when the process that started this one ends.

    Raises:
        ConfigError: a quota is not understood, the name is empty, siblings are no addresses of others, or engines are
            followed without an index to tell.
    """

    name: str = "kvstore"
    host: str = "127.0.0.1"
    grpc_port: Port = 50052
    memory_bytes: Count = 1 << 30
    eviction: Eviction = Eviction.VALUE
    tenant_dram_bytes: _Bytes = 0
    tenant_disk_bytes: _Bytes = 0
    tenant_quotas: tuple[str, ...] = ()
    disk_dir: Path | None = None
    disk_bytes: Count = 16 << 30
    disk_write: DiskWrite = DiskWrite.THROUGH
    redis: RedisConfig = field(default_factory=RedisConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    vllm_feeds: VllmFeedsConfig = field(default_factory=VllmFeedsConfig)
    siblings: tuple[str, ...] = ()
    handover_s: Annotated[float, Between(0.0, 3600.0)] = 20.0
    max_hashes: Count = 65_536
    max_workers: Count = 1024
    max_lease_s: Annotated[float, Between(0.01, 3600.0)] = 60.0
    settle_s: Annotated[float, Between(0.0, 3600.0)] = 5.0
    mailbox: Count = 4096
    exit_with_parent: bool = False

    def __post_init__(self) -> None:
        parse_quotas(self.tenant_quotas)
        check_name(self.name)
        check_addresses(self.siblings, "siblings")
        own = f"{self.host}:{self.grpc_port}"
        if own in self.siblings:
            raise ConfigError(f"siblings names this store itself, {own}: it wants the others", field="siblings")
        if self.vllm_feeds.engines and self.redis.url is None:
            raise ConfigError("vllm_feeds.engines needs an index: set redis.url", field="vllm_feeds.engines")

    @property
    def quotas(self) -> Quotas:
        """Limits by tenant."""
        common = Quota(dram_bytes=self.tenant_dram_bytes, disk_bytes=self.tenant_disk_bytes)
        return Quotas(common=common, single=parse_quotas(self.tenant_quotas))
