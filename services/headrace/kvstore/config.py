"""Settings of the kvstore."""

from dataclasses import dataclass

from headrace.settings import Count, Port


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig:
    """Settings of the kvstore.

    Attributes:
        name: Unique in the cluster; also the name of the store's own location in the index.
        host: Address the gRPC server binds.
        grpc_port: Port of the gRPC server.
        memory_bytes: Size of the block pool; mapped when the first worker tells its block size.
        max_hashes: Most block hashes of one call.
        max_workers: Most workers in the index.
        max_lease_s: Longest lease; a longer one asked for is cut.
        settle_s: How long after the end of its lease a silent writer is still believed to write.
        mailbox: Most calls that wait.
        exit_with_parent: End when the process that started this one ends.
    """

    name: str = "kvstore"
    host: str = "127.0.0.1"
    grpc_port: Port = 50052
    memory_bytes: Count = 1 << 30
    max_hashes: Count = 65_536
    max_workers: Count = 1024
    max_lease_s: float = 60.0
    settle_s: float = 5.0
    mailbox: Count = 4096
    exit_with_parent: bool = False
