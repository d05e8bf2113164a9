"""Settings of the shared index."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from headrace.core.addresses import is_address
from headrace.core.placement import FOREIGN_PREFIX
from headrace.errors import ConfigError
from headrace.settings import Between, Count

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PATH = re.compile(r"\S+")
_FORM = "NAME=PUB_ENDPOINT or NAME=PUB_ENDPOINT REPLAY_ENDPOINT, each tcp://HOST:PORT or ipc://PATH"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """How a process takes part in the index; where its log is, says `redis`.

    Attributes:
        key_prefix: Begins the name of every key in Redis; one per cluster.
        budget_bytes: Memory that a copy of the index may take; blocks of little value leave for others.
        max_locations: Most workers and kvstores.
        forget_after_s: A location that has been silent for so long is dropped.
    """

    key_prefix: str = "headrace:index"
    budget_bytes: Count = 256 << 20
    max_locations: Count = 1024
    forget_after_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedEngine:
    """An engine whose KV events are followed.

    Attributes:
        location: Its name in the index.
        endpoint: Its PUB socket.
        replay_endpoint: Its ROUTER socket; empty for none.
    """

    location: str
    endpoint: str
    replay_endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmFeedsConfig:
    """Which engines' KV events in vLLM's format become part of the index, and within which bounds.

    Attributes:
        engines: Each `NAME=PUB_ENDPOINT` or `NAME=PUB_ENDPOINT REPLAY_ENDPOINT`; in the index it is `foreign/NAME`.
        topic: First bytes of the topics to hear.
        fingerprint: Of the model that they serve; empty is that of the first worker that shakes hands.
        max_blocks: Most blocks of ours that one engine's blocks may come to; further ones are left out.
        max_message_bytes: Longest message; one that is longer ends the connection, and with it what was known.
        max_waiting: Messages of an engine that wait before some are lost, which costs a replay.
        replay_deadline_s: Longest that one replay may take.

    Raises:
        ConfigError: an engine is not of that form, or two have one name.
    """

    engines: tuple[str, ...] = ()
    topic: str = ""
    fingerprint: str = ""
    max_blocks: Count = 262_144
    max_message_bytes: Count = 1 << 20
    max_waiting: Count = 256
    replay_deadline_s: Annotated[float, Between(0.1, 600.0)] = 10.0

    def __post_init__(self) -> None:
        locations = [engine.location for engine in self.followed()]
        if len(locations) != len(set(locations)):
            raise ConfigError("two engines have one name", field="vllm_feeds.engines")

    def followed(self) -> Iterator[FollowedEngine]:
        """Yield the engines.

        Raises:
            ConfigError: one is not understood.
        """
        for text in self.engines:
            name, _, endpoints = text.partition("=")
            endpoint, _, replay = endpoints.partition(" ")
            known = (endpoint, replay) if replay else (endpoint,)
            if not _NAME.fullmatch(name) or not all(map(_is_endpoint, known)):
                raise ConfigError(f"an engine is {_FORM}; found {text!r}", field="vllm_feeds.engines")
            yield FollowedEngine(location=FOREIGN_PREFIX + name, endpoint=endpoint, replay_endpoint=replay)


def _is_endpoint(text: str) -> bool:
    scheme, _, rest = text.partition("://")
    return is_address(rest) if scheme == "tcp" else scheme == "ipc" and bool(_PATH.fullmatch(rest))
