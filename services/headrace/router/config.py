"""Settings of the router."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from headrace.core.addresses import check_addresses, check_name
from headrace.core.tenancy import ALL_TENANTS, Tenancy
from headrace.index.config import IndexConfig
from headrace.index.connection import RedisConfig
from headrace.settings import Between, Count, Port, Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Settings of the router.

    Attributes:
        name: Unique in the cluster.
        host: Address both servers bind.
        http_port: Port of the OpenAI-compatible server.
        grpc_port: Port of the gRPC server.
        workers: host:port of every worker.
        kvstores: host:port of every kvstore.
        ingestors: host:port of every ingestor; without one no contexts are taken in.
        redis: Where the log of the shared index is; without it requests are routed by load alone.
        index: How large the router's copy of the index may become.
        drift_alarm: Share by which what the index promises and what is found may differ before that is an alarm.
        model: GGUF file or Hugging Face folder; the router reads its tokenizer and chat template.
        model_name: What requests call the model; None takes the name of the file or folder.
        cache_dir: Where parsed tokenizers are kept; None parses at every start.
        max_live_requests: Admission bound: further requests get 503 with a time to retry.
        max_contexts: Most contexts that may arrive, or be answered, at a time.
        max_tenant_contexts: Most of one tenant.
        context_idle_s: When a context that is computed as far as it is known, and of which nothing comes, is dropped;
            longer than `ingestor.idle_s`, which knows contexts better.
        default_timeout_s: Deadline of a request that names none.
        max_timeout_s: Longest deadline a request may name.
        max_moves: How often a request may move to other workers after failures.
        first_report_timeout_s: How long a worker may stay silent before it counts as dead.
        canary_interval_s: Longest age of the last answered token before readiness is proven anew.
        max_body_bytes: Largest HTTP body or gRPC request.
        receive_timeout_s: How long the head of an HTTP request may take to arrive, and then its body.
        drain_s: How long running requests may go on when the process is asked to leave.
        cache_secret: Keys of tenants' blocks are made from it, so the routers of a cluster need the same one; when it
            is empty, whoever reaches the stores can compute them.
        public_tenants: Tenants whose requests may share prefixes with everybody (`cache_scope: public`); `*` is all.
        exit_with_parent: End when the process that started this one ends.

    Raises:
        ConfigError: the name is empty, or addresses are none.
    """

    name: str = "router"
    host: str = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 50051
    workers: tuple[str, ...] = ()
    kvstores: tuple[str, ...] = ()
    ingestors: tuple[str, ...] = ()
    redis: RedisConfig = RedisConfig()
    index: IndexConfig = IndexConfig()
    drift_alarm: Annotated[float, Between(0.0, 1.0)] = 0.3
    model: Path
    model_name: str | None = None
    cache_dir: Path | None = None
    max_live_requests: Count = 256
    max_contexts: Count = 256
    max_tenant_contexts: Count = 192
    context_idle_s: Annotated[float, Between(0.1, 86_400.0)] = 300.0
    default_timeout_s: float = 600.0
    max_timeout_s: float = 3600.0
    max_moves: int = 3
    first_report_timeout_s: float = 2.0
    canary_interval_s: float = 15.0
    max_body_bytes: Count = 8 << 20
    receive_timeout_s: Annotated[float, Between(0.1, 86_400.0)] = 60.0
    drain_s: Annotated[float, Between(0.0, 86_400.0)] = 10.0
    cache_secret: Secret = Secret("")
    public_tenants: tuple[str, ...] = (ALL_TENANTS,)
    exit_with_parent: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        check_addresses(self.workers, "workers")
        check_addresses(self.kvstores, "kvstores")
        check_addresses(self.ingestors, "ingestors")

    def tenancy(self) -> Tenancy:
        """Return the rules about tenants."""
        return Tenancy(secret=self.cache_secret.reveal().encode(), public_tenants=self.public_tenants)
