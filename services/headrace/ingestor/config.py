"""Settings of the ingestor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from headrace.core.addresses import check_addresses, check_name
from headrace.errors import ConfigError
from headrace.settings import Between, Count, Port

_Seconds = Annotated[float, Between(0.0, 86_400.0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestorConfig:
    """Settings of the ingestor.

    Attributes:
        name: Unique in the cluster, without a dot; part of the ids of its contexts.
        host: Address the gRPC server binds.
        grpc_port: Port of the gRPC server.
        routers: host:port of the routers' gRPC servers; when one is lost the next is taken.
        model: GGUF file or Hugging Face folder; the ingestor reads its tokenizer and chat template.
        max_streams: Most contexts that are open or being answered.
        max_tenant_streams: Most of one tenant.
        max_ended: Most that are kept for `grace_s` after their end; of those over it the tenant that has most loses its
            oldest.
        max_chunk_bytes: Most bytes of text of one operation.
        max_context_chars: Most characters of one context.
        max_text_chars: Most characters of all contexts together.
        max_segments: Most segments of one context.
        default_timeout_s: Longest time from the opening of a context to the end of its answer, if it names none.
        max_timeout_s: Longest such time that a context may name.
        grace_s: How long a context stays whose connection broke, and an answer that is complete and read by nobody.
        idle_s: How long an open context may go without any operation.
        coalesce_s: How long a change waits for others to travel with it; a close never waits.
        drain_s: How long contexts may go on when the process is asked to leave.
        reopen_s: How long an answer is asked for again after its router was lost.
        exit_with_parent: End when the process that started this one ends.

    Raises:
        ConfigError: the name is empty or has a dot, or the routers are none.
    """

    name: str = "ingestor"
    host: str = "127.0.0.1"
    grpc_port: Port = 50053
    routers: tuple[str, ...] = ("127.0.0.1:50051",)
    model: Path
    max_streams: Count = 256
    max_tenant_streams: Count = 64
    max_ended: Count = 4096
    max_chunk_bytes: Count = 1 << 20
    max_context_chars: Count = 8 << 20
    max_text_chars: Count = 256 << 20
    max_segments: Count = 4096
    default_timeout_s: _Seconds = 600.0
    max_timeout_s: _Seconds = 3600.0
    grace_s: _Seconds = 30.0
    idle_s: _Seconds = 60.0
    coalesce_s: Annotated[float, Between(0.0, 1.0)] = 0.01
    drain_s: _Seconds = 10.0
    reopen_s: _Seconds = 30.0
    exit_with_parent: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        if "." in self.name:
            raise ConfigError(f"name must have no dot, found {self.name!r}", field="name")
        if not self.routers:
            raise ConfigError("routers names nobody: an ingestor needs a router", field="routers")
        check_addresses(self.routers, "routers")
