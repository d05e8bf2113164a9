"""Check what a client asks for, and fill what it left open."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from headrace.core.request import GenerationRequest, RequestId, SamplingParams
from headrace.core.tenancy import DEFAULT_TENANT, CacheScope, Tenancy
from headrace.errors import ContextOverflow, InvalidRequest

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_SEED_RANGE = (-(2**63), 2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask of one model.

    Attributes:
        model: Name of the model.
        max_context_tokens: Most tokens of prompt and answer together.
        vocab_size: Token ids are below it.
        max_choices: Most answers to one prompt.
        max_stop: Most stop texts.
        max_stop_chars: Longest stop text.
        max_stop_token_ids: Most stop tokens.
        max_logit_bias: Most biased tokens.
        max_logprobs: Most alternatives reported per position.
        max_cache_salt_bytes: Longest cache salt, in UTF-8.
        default_timeout_s: Deadline of requests that name none.
        max_timeout_s: Longest deadline a request may name.
    """

    model: str
    max_context_tokens: int
    vocab_size: int
    max_choices: int = 16
    max_stop: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 128
    max_logit_bias: int = 300
    max_logprobs: int = 20
    max_cache_salt_bytes: int = 256
    default_timeout_s: float = 600.0
    max_timeout_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDraft:
    """A request as a client gave it: types are right, ranges are not checked, None is "not given".

    Attributes:
        prompt: Prompt token ids.
        top_k: -1 and 0 keep all, as None does.
        logit_bias: Token id to addend.
        max_tokens: None takes `default_max_tokens`, or what the context still holds if that is less.
        default_max_tokens: None takes what the context still holds.
        seed: None takes `fresh_seed`; negative seeds are allowed and distinct.
        fresh_seed: 64 random bits drawn by the caller.
        timeout_s: Seconds from now to the deadline.
        cache_salt: Keeps the blocks apart from others of the tenant.
        cache_scope: Value of a `CacheScope`.
        tenant: Checked name of who asks.
        names: What the client calls a field, where that differs from the name here.
    """

    request_id: str
    prompt: Sequence[int]
    fresh_seed: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    logprobs: int | None = None
    num_choices: int | None = None
    stop: Sequence[str] | None = None
    timeout_s: float | None = None
    cache_salt: str | bytes | None = None
    cache_scope: str | None = None
    tenant: str = DEFAULT_TENANT
    names: Mapping[str, str] = field(default_factory=dict)


def build_request(
    draft: RequestDraft, limits: RequestLimits, tenancy: Tenancy, *, now_unix_ms: int, is_open: bool = False
) -> GenerationRequest:
    """Return the checked request of a draft.

    Args:
        draft: What the client gave.
        limits: What it may ask for.
        tenancy: Turns tenant, scope and salt into the key of its blocks.
        now_unix_ms: Clock time from which the timeout runs.
        is_open: Whether the prompt still arrives: it may be empty.

    Raises:
        InvalidRequest: a value is out of range; names the field as the client calls it, the
            value found and the limit.
    """
    check = _Checker(draft.names)
    if _REQUEST_ID.fullmatch(draft.request_id) is None:
        check.refuse("request_id", "1 to 128 characters of A-Z a-z 0-9 . _ : / + = @ -", "another text")
    prompt = check.tokens("prompt", draft.prompt, limits.vocab_size)
    if not draft.prompt and not is_open:
        check.refuse("prompt", "at least 1 token", "0 tokens")
    max_tokens = _max_tokens(draft, limits, check)
    stop = _stop(draft, limits, check)
    timeout_s = check.positive("timeout", draft.timeout_s, limits.default_timeout_s, limits.max_timeout_s)
    return GenerationRequest(
        request_id=RequestId(draft.request_id),
        model=limits.model,
        prompt=prompt,
        sampling=_sampling(draft, limits, check, max_tokens),
        num_choices=check.integer("n", draft.num_choices, 1, (1, limits.max_choices)),
        stop=stop,
        deadline_unix_ms=now_unix_ms + math.ceil(timeout_s * 1000),
        cache_key=tenancy.cache_key(draft.tenant, _scope(draft, check), _cache_salt(draft, limits, check)),
        tenant=draft.tenant,
    )


class _Checker:
    """Range checks that raise with the client's name of a field, what was found and the limit."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def refuse(self, name: str, limit: str, found: object) -> NoReturn:
        shown = self._names.get(name, name)
        raise InvalidRequest(f"{shown} must be {limit}, found {found}", field=shown, limit=limit)

    def number(self, name: str, found: float | None, default: float, bounds: tuple[float, float]) -> float:
        low, high = bounds
        value = default if found is None else found
        # Written so that NaN, for which every comparison is false, is refused.
        if not low <= value <= high:
            self.refuse(name, f"from {low:g} to {high:g}", value)
        return float(value)

    def positive(self, name: str, found: float | None, default: float, high: float) -> float:
        value = default if found is None else found
        if not 0 < value <= high:
            self.refuse(name, f"above 0 and at most {high:g}", value)
        return float(value)

    def integer(self, name: str, found: int | None, default: int, bounds: tuple[int, int]) -> int:
        low, high = bounds
        value = default if found is None else found
        if not low <= value <= high:
            self.refuse(name, f"from {low} to {high}", value)
        return value

    def count(self, name: str, found: int, high: int, what: str) -> None:
        if found > high:
            self.refuse(name, f"at most {high} {what}", found)

    def tokens(self, name: str, found: Iterable[int], vocab_size: int) -> tuple[int, ...]:
        ids = tuple(found)
        if ids and (min(ids) < 0 or max(ids) >= vocab_size):
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            self.refuse(name, f"token ids from 0 to {vocab_size - 1}", wrong)
        return ids


def _max_tokens(draft: RequestDraft, limits: RequestLimits, check: _Checker) -> int:
    num_prompt, context = len(draft.prompt), limits.max_context_tokens
    check_prompt_length(num_prompt, limits, name=draft.names.get("prompt", "prompt"))
    room = context - num_prompt
    if draft.max_tokens is None:
        return room if draft.default_max_tokens is None else min(room, draft.default_max_tokens)
    if draft.max_tokens < 1:
        check.refuse("max_tokens", "at least 1", draft.max_tokens)
    check_room(num_prompt, draft.max_tokens, limits, name=draft.names.get("max_tokens", "max_tokens"))
    return draft.max_tokens


def check_room(num_prompt: int, max_tokens: int, limits: RequestLimits, *, name: str = "max_tokens") -> None:
    """Refuse an answer that does not fit behind its prompt.

    Raises:
        ContextOverflow: prompt and answer together are longer than the context.
    """
    if num_prompt + max_tokens > limits.max_context_tokens:
        raise ContextOverflow(
            f"prompt of {num_prompt} tokens and {name} of {max_tokens} make {num_prompt + max_tokens} "
            f"tokens; the context of {limits.model} holds {limits.max_context_tokens}",
            field=name,
            limit=f"{limits.max_context_tokens} tokens of prompt and answer together",
            num_tokens=num_prompt,
        )


def check_prompt_length(num_tokens: int, limits: RequestLimits, *, name: str = "prompt") -> None:
    """Refuse a prompt that leaves no room for an answer.

    Args:
        num_tokens: Tokens of the prompt, or a number that it has at least.
        limits: Limits of the model.
        name: What the client calls the prompt.

    Raises:
        ContextOverflow: the prompt fills the context or more.
    """
    context = limits.max_context_tokens
    if num_tokens >= context:
        raise ContextOverflow(
            f"{name} has at least {num_tokens} tokens; the context of {limits.model} holds {context} for prompt "
            "and answer together",
            field=name,
            limit=f"{context - 1} tokens",
            num_tokens=num_tokens,
        )


def _stop(draft: RequestDraft, limits: RequestLimits, check: _Checker) -> tuple[str, ...]:
    stop = tuple(draft.stop or ())
    check.count("stop", len(stop), limits.max_stop, "stop texts")
    for text in stop:
        if not 1 <= len(text) <= limits.max_stop_chars:
            check.refuse("stop", f"texts of 1 to {limits.max_stop_chars} characters", f"one of {len(text)}")
    return stop


def _scope(draft: RequestDraft, check: _Checker) -> CacheScope:
    if draft.cache_scope is None:
        return CacheScope.TENANT
    names = [scope.value for scope in CacheScope]
    if draft.cache_scope not in names:
        check.refuse("cache_scope", " or ".join(names), "another text")
    return CacheScope(draft.cache_scope)


def _cache_salt(draft: RequestDraft, limits: RequestLimits, check: _Checker) -> bytes:
    salt = draft.cache_salt or b""
    salt_bytes = salt.encode() if isinstance(salt, str) else salt
    check.count("cache_salt", len(salt_bytes), limits.max_cache_salt_bytes, "bytes")
    return salt_bytes


def _sampling(draft: RequestDraft, limits: RequestLimits, check: _Checker, max_tokens: int) -> SamplingParams:
    check.count("stop_token_ids", len(draft.stop_token_ids or ()), limits.max_stop_token_ids, "token ids")
    return SamplingParams(
        temperature=check.number("temperature", draft.temperature, 1.0, (0.0, 100.0)),
        top_k=_top_k(draft, check),
        top_p=check.positive("top_p", draft.top_p, 1.0, 1.0),
        min_p=check.number("min_p", draft.min_p, 0.0, (0.0, 1.0)),
        repetition_penalty=check.positive("repetition_penalty", draft.repetition_penalty, 1.0, 100.0),
        presence_penalty=check.number("presence_penalty", draft.presence_penalty, 0.0, (-2.0, 2.0)),
        frequency_penalty=check.number("frequency_penalty", draft.frequency_penalty, 0.0, (-2.0, 2.0)),
        logit_bias=_logit_bias(draft, limits, check),
        max_tokens=max_tokens,
        min_tokens=check.integer("min_tokens", draft.min_tokens, 0, (0, max_tokens)),
        stop_token_ids=check.tokens("stop_token_ids", draft.stop_token_ids or (), limits.vocab_size),
        ignore_eos=bool(draft.ignore_eos),
        seed=_seed(draft, check),
        logprobs=_if_given(draft.logprobs, lambda found: check.integer("logprobs", found, 0, (0, limits.max_logprobs))),
    )


def _if_given(found: int | None, check: Callable[[int], int]) -> int | None:
    return None if found is None else check(found)


def _top_k(draft: RequestDraft, check: _Checker) -> int | None:
    top_k = draft.top_k
    if top_k is None or top_k in (-1, 0):
        return None
    # The wire carries 32 bits.
    return check.integer("top_k", top_k, 1, (1, 2**32 - 1))


def _seed(draft: RequestDraft, check: _Checker) -> int:
    seed = check.integer("seed", draft.seed, draft.fresh_seed, _SEED_RANGE)
    return seed % 2**64


def _logit_bias(draft: RequestDraft, limits: RequestLimits, check: _Checker) -> tuple[tuple[int, float], ...]:
    bias = draft.logit_bias or {}
    check.count("logit_bias", len(bias), limits.max_logit_bias, "entries")
    check.tokens("logit_bias", bias, limits.vocab_size)
    return tuple((token, check.number("logit_bias", addend, 0.0, (-100.0, 100.0))) for token, addend in bias.items())
