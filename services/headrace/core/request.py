"""What a client asks for, and what a worker sees of it."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from headrace.core.placement import Tier
from headrace.core.tenancy import DEFAULT_TENANT

RequestId = NewType("RequestId", str)
SequenceId = NewType("SequenceId", str)
"""Unique over the cluster: the request's id and the choice's index."""

PROTOCOL_VERSION = 1
"""Version of proto/headrace/v1 that this code speaks; peers of another are refused."""


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; ranges are checked by `core.validate`.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Keep the smallest set with at least this probability.
        min_p: Keep tokens with at least this share of the best probability.
        repetition_penalty: Divides (positive) or multiplies (negative) logits of seen tokens.
        presence_penalty: Subtracted once from logits of generated tokens.
        frequency_penalty: Subtracted per occurrence from logits of generated tokens.
        logit_bias: Pairs (token id, addend).
        max_tokens: Most tokens to generate.
        min_tokens: No stop token ends the answer before this many tokens.
        stop_token_ids: Tokens that end the answer.
        ignore_eos: Go on after the model's end-of-sequence token.
        seed: Key of the counter-based generator.
        logprobs: Number of most likely tokens to report per position; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """A stretch of a prompt's blocks that somebody holds, by the word of the index.

    Attributes:
        location: Name of the worker or kvstore.
        address: host:port of its gRPC server.
        tier: The slowest of these blocks.
        start: First block.
        end: Block after the last.
    """

    location: str
    address: str
    tier: Tier
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """One choice of one request: tokens in, tokens out.

    Attributes:
        sequence_id: Unique over the cluster.
        model: Name of the model.
        prompt: Prompt token ids, at least one.
        output: Tokens generated before a move from another worker; the answer goes on after them.
        sampling: How to choose tokens.
        choice: Index of this choice; part of the random generator's key.
        deadline_unix_ms: Clock end of the request.
        cache_key: What `core.tenancy` made of the tenant, for the root of its blocks; empty is the public root.
        tenant: Whose quotas its blocks count for.
        sources: Where blocks of the prompt can be fetched: a hint of the router, which may be out of date.
    """

    sequence_id: SequenceId
    model: str
    prompt: tuple[int, ...]
    output: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choice: int = 0
    deadline_unix_ms: int
    cache_key: bytes = b""
    tenant: str = DEFAULT_TENANT
    sources: tuple[CachedPrefix, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and output so far."""
        return self.prompt + self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """The next version of a prompt that still arrives: some of its leading tokens, followed by others.

    Attributes:
        version: One more than the last, the opening is version 0; or that of the last, of which nothing but the close
            was left.
        num_kept: Leading tokens that stay.
        tokens: Those that follow them.
        num_final: Leading tokens that no later version changes.
        is_closed: Whether this is the last version: what follows is its answer.
    """

    version: int
    num_kept: int
    tokens: tuple[int, ...] = ()
    num_final: int = 0
    is_closed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextProgress:
    """How far a version of a prompt that still arrives is computed.

    Attributes:
        version: Of the prompt.
        num_computed: Leading tokens whose KV is present.
        num_tokens: Tokens of the version.
    """

    version: int
    num_computed: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token.

    Attributes:
        cursor: Index in the answer, from 0.
        token_id: Token id.
        logprob: Log of the model's probability before temperature and penalties, if asked for.
        top_logprobs: Pairs (token id, logprob), best first.
        finish: Set on the last token.
    """

    cursor: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A checked request: all its choices, in tokens.

    Attributes:
        prompt: Prompt token ids, at least one.
        sampling: Shared by all choices; each choice keys the random generator with its index.
        num_choices: Number of answers.
        stop: Texts that end an answer and are not shown.
        deadline_unix_ms: Clock end of the request.
        cache_key: As in `SequenceSpec`.
        tenant: Who asks.
    """

    request_id: RequestId
    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    deadline_unix_ms: int
    cache_key: bytes = b""
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a finished request; `cached_tokens` were reused, not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What became final of one choice.

    Attributes:
        choice: Index of the answer.
        text: Never half a character, never part of a stop text.
        tokens: The tokens that arrived with it.
        finish: Set on the last piece of the choice.
        usage: Set on the last piece of the request.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
