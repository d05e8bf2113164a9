"""What the SDK takes and gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from headrace.core.request import FinishReason, Token, Usage


class Message(TypedDict):
    """One message of a chat: role is "system", "user" or "assistant"."""

    role: str
    content: str


class GenerateOptions(TypedDict, total=False):
    """How to answer; every option may be left out, None means the same.

    Attributes:
        model: Name of the model; the only one served by default.
        max_tokens: Most tokens to generate; by default what the context still holds.
        min_tokens: No stop ends the answer before this many tokens.
        temperature: 0 is greedy; 1 by default.
        top_k: Keep the k most likely tokens; -1 keeps all.
        top_p: Keep the smallest set with at least this probability.
        min_p: Keep tokens with at least this share of the best probability.
        repetition_penalty: Divides or multiplies logits of seen tokens.
        presence_penalty: Subtracted once from logits of generated tokens.
        frequency_penalty: Subtracted per occurrence from logits of generated tokens.
        logit_bias: Token id to addend.
        stop: Texts that end the answer and are not shown.
        stop_token_ids: Tokens that end the answer.
        ignore_eos: Go on after the model's end-of-sequence token.
        seed: Makes the answer repeatable.
        logprobs: Number of most likely tokens to report per position.
        n: Number of answers.
        timeout_s: Longest time for the whole call, retries included.
        request_id: Name in logs; the router makes one by default.
        cache_salt: Secret that separates cached prefixes within the tenant.
        cache_scope: Who may reuse this call's prefix: the "tenant", as by default, or everybody.
    """

    model: str | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    seed: int | None
    logprobs: int | None
    n: int | None
    timeout_s: float | None
    request_id: str | None
    cache_salt: str | None
    cache_scope: Literal["tenant", "public"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer to a prompt.

    Attributes:
        finish: Why it ended.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: FinishReason

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the generated tokens."""
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A finished call.

    Attributes:
        request_id: Its name in logs.
        model: Who answered.
        choices: As many as were asked for.
        usage: Token counts; None if the router did not say.
        ttft_s: Seconds from the call to its first token, retries included.
        total_s: Seconds from the call to its end.
    """

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    ttft_s: float
    total_s: float

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish

    @property
    def tokens_per_s(self) -> float:
        """Tokens after each choice's first, per second after the first token; 0 when there are none."""
        num_later = sum(max(0, len(choice.tokens) - 1) for choice in self.choices)
        decode_s = self.total_s - self.ttft_s
        return num_later / decode_s if decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model served.

    Attributes:
        max_context_tokens: Most tokens of prompt and answer together.
        fingerprint: Digest of weights, dtype, KV layout and kernels.
    """

    name: str
    max_context_tokens: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberInfo:
    """A process of the cluster as the router sees it.

    Attributes:
        role: "prefill", "decode", "hybrid" or "kvstore".
        address: host:port of its gRPC server.
        is_connected: Whether its reports arrive.
        not_ready_reason: Empty when it is ready.
        total_blocks: free + cached + leased.
    """

    name: str
    role: str
    address: str
    is_connected: bool
    is_ready: bool
    not_ready_reason: str
    is_draining: bool
    num_running: int
    num_waiting: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    leased_blocks: int
