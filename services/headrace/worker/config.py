"""Settings of a worker."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

from headrace.core.addresses import check_addresses, check_name
from headrace.index.config import IndexConfig
from headrace.index.connection import RedisConfig
from headrace.index.vllm_publisher import VllmPublisherConfig
from headrace.settings import Between, Count, Port

_QUANTISATION = re.compile(r"[.-](?:I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


class WorkerRole(Enum):
    """What the router prefers to send to a worker; every worker can do both."""

    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"


class Dtype(Enum):
    """Precision of weights, activations and KV; sums are always fp32.

    `auto` keeps weights in the quantised grid of the file, with KV in bf16 and activations finer than bf16, where
    the device has kernels for it; else it is bf16. Steps of many rows compute in bf16 throughout where that was
    measured to be clearly faster. `int4` is the grid or an error. `int8` rounds the inputs of most layers to int8
    besides: faster, about as coarse as bf16 throughout (README), and an error where it cannot be had.
    """

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class Pack(Enum):
    """How the prompt chunks of a step lie in memory; tokens of an answer are the same with each.

    `varlen` puts all tokens on one axis and computes no others. `bins` fills rows of equal length with several
    chunks each (technique `prepacking`), `pad` gives each chunk a row of its own: for comparisons, and for devices
    whose kernels want rectangles.
    """

    VARLEN = "varlen"
    BINS = "bins"
    PAD = "pad"


class StreamOrder(Enum):
    """Who comes first in a step.

    `default` goes by arrival alone. The others serve prompts that are complete before those that still arrive, and
    these before streams that have stalled; within each group `fcfs` goes by arrival of the request, `lcas` by arrival
    of its last piece, `mcps` by computed tokens, most first.
    """

    DEFAULT = "default"
    FCFS = "fcfs"
    LCAS = "lcas"
    MCPS = "mcps"


class Preempt(Enum):
    """What becomes of the KV of a sequence that gives up its blocks.

    `recompute` forgets it, `swap` copies it to host memory as long as that has room, `auto` does what costs less by
    the measured costs of steps and copies.
    """

    AUTO = "auto"
    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Settings of a worker.

    Attributes:
        name: Unique in the cluster.
        role: What the router prefers to send here.
        host: Address the gRPC server binds.
        grpc_port: Port of the gRPC server.
        model: GGUF file or Hugging Face folder.
        model_name: What requests call the model; None takes the name of the file or folder,
            without the mark of its quantisation.
        dtype: Precision.
        device: Torch device of weights and KV.
        threads: Most threads per tensor operation; 0 takes all cores.
        shared_cores: File that the workers of one machine name to share its cores: each takes an
            equal part while others compute too; None shares with nobody.
        give_way: How long a decode worker rests after a step for each user who waits for a first token from a
            prefill worker of the same machine, in times of the step: more shortens first tokens and lengthens the
            gaps after them.
        block_tokens: Tokens per KV block: 16, 32 or 64.
        kv_memory_bytes: Size of the block pool.
        max_running: Most sequences that hold blocks at once.
        shape: Technique that shapes steps ("sarathi" cuts prompts into chunks), or "whole".
        token_budget: Most tokens of one step; a chunk is never larger.
        tbt_target_ms: Longest time between the tokens of running answers that `shape` is to keep to by making
            chunks smaller while there are any; None keeps to `token_budget` alone.
        dynamic_chunks: Whether later chunks of a prompt, which attend to more, shrink so that steps take the same
            time.
        calibrate_s: Longest time to measure at the start what steps cost, in seconds, unless an earlier start of
            the same model and settings on this machine left a sound fit and a few steps still agree with it; 0
            neither measures nor looks. Without it there are no targets of time, and no prompt is refused because
            its deadline is too near.
        stream_order: Who comes first in a step, where prompts arrive in pieces.
        stall_s: Seconds after which a context of which nothing is heard has stalled: others may take its blocks.
        preempt: What becomes of the KV of a sequence that gives up its blocks.
        swap_memory_bytes: Most host memory for that KV; taken when it is needed.
        pack: How prompt chunks of a step lie in memory: on one axis ("varlen"), in shared rows ("bins"), or each
            padded to the longest ("pad").
        kvstores: host:port of every kvstore; none runs without. All processes write them alike, for blocks are
            shared out over these texts.
        peers: host:port of other workers, connected before this one is Ready.
        cache_dir: Where weights packed for the C++ kernels and the measured cost of steps are kept for the next
            start; None takes where the compiled kernels are kept: HEADRACE_CACHE_DIR, else `headrace` in the
            user's cache folder. Several workers share it.
        transfer_deadline_s: Longest time for one transfer of blocks.
        early_start: Whether a prompt may start with the first layers of its fetched blocks while the others land.
        store_blocks: Whether full blocks are put into the kvstores.
        store_bytes_per_s: Rate of puts while the engine works; None takes an eighth of what the lane gives.
        digest_share: Share of blocks whose bytes are checked when they have been fetched, from 0 to 1.
        redis: Where the index of all blocks is kept; without its URL this worker's blocks are in no index.
        index: Which index of that Redis.
        vllm_events: Where the cache's changes are told in vLLM's format; without its endpoint nowhere.
        push_whole: Push KV once after the whole prompt instead of chunk by chunk; the
            baseline of a benchmark.
        exit_with_parent: End when the process that started this one ends.

    Raises:
        ConfigError: the name is empty, or addresses are none.
    """

    name: str
    role: WorkerRole
    host: str = "127.0.0.1"
    grpc_port: Port = 50061
    model: Path
    model_name: str | None = None
    dtype: Dtype = Dtype.AUTO
    device: str = "cpu"
    threads: int = 0
    shared_cores: Path | None = None
    give_way: Annotated[float, Between(0.0, 100.0)] = 0.5
    block_tokens: int = 16
    kv_memory_bytes: Count = 1 << 30
    max_running: Count = 64
    shape: str = "sarathi"
    token_budget: Count = 512
    tbt_target_ms: Annotated[float, Between(1.0, 60_000.0)] | None = None
    dynamic_chunks: bool = False
    calibrate_s: Annotated[float, Between(0.0, 60.0)] = 3.0
    stream_order: StreamOrder = StreamOrder.FCFS
    stall_s: Annotated[float, Between(0.0, 3600.0)] = 1.0
    preempt: Preempt = Preempt.AUTO
    swap_memory_bytes: Annotated[int, Between(0)] = 1 << 28
    pack: Pack = Pack.VARLEN
    kvstores: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    cache_dir: Path | None = None
    transfer_deadline_s: float = 10.0
    early_start: bool = True
    store_blocks: bool = True
    store_bytes_per_s: Annotated[float, Between(1.0)] | None = None
    digest_share: Annotated[float, Between(0.0, 1.0)] = 1 / 16
    redis: RedisConfig = RedisConfig()
    index: IndexConfig = IndexConfig()
    vllm_events: VllmPublisherConfig = VllmPublisherConfig(endpoint="")
    push_whole: bool = False
    exit_with_parent: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        check_addresses(self.kvstores, "kvstores")
        check_addresses(self.peers, "peers")

    @property
    def served_name(self) -> str:
        """What requests call the model: as set, or the file's name without the mark of its quantisation."""
        name = self.model.stem if self.model.suffix == ".gguf" else self.model.name
        return self.model_name or _QUANTISATION.sub("", name)
