"""Request bodies: their fields, their strict types, and how they are read."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from headrace.errors import InvalidRequest
from headrace.router.http.context import HttpSettings
from headrace.router.http.errors import BodyTimeout, BodyTooLarge, UnsupportedMedia


class _Strict(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A body whose unknown fields are refused; `null` means "not given" for every optional field."""


class StreamOptions(_Strict, kw_only=True, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(msgspec.Struct, kw_only=True, frozen=True):
    """A part of a message; only type "text" is supported, and other fields belong to other types."""

    type: str
    text: str | None = None


class Message(_Strict, kw_only=True, frozen=True):
    """One message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None


class SamplingBody(_Strict, kw_only=True, frozen=True):
    """Fields that chat and completions share; ranges are checked by `core.validate`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    cache_scope: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Any = None
    service_tier: Any = None


class ChatBody(SamplingBody, kw_only=True, frozen=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    modalities: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionBody(SamplingBody, kw_only=True, frozen=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizeBody(_Strict, kw_only=True, frozen=True):
    """Body of /tokenize; exactly one of `prompt` and `messages` is given."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Strict, kw_only=True, frozen=True):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]


class ContextBody(SamplingBody, kw_only=True, frozen=True):
    """Body of /v1/contexts; `messages` makes the answer that of a chat, `prefix` is plain text."""

    mode: str | None = None
    prefix: str | None = None
    messages: list[Message] | None = None
    logprobs: int | None = None


class OperationBody(_Strict, kw_only=True, frozen=True):
    """Body of a change of a context; without a number it is the next one."""

    sequence: int | None = None


class AppendBody(OperationBody, kw_only=True, frozen=True):
    """Body of /v1/contexts/{id}/append; without a segment the text belongs to the last one."""

    text: str
    segment: str | None = None


class SegmentBody(_Strict, kw_only=True, frozen=True):
    """A named part of a context."""

    id: str
    text: str


class UpdateBody(OperationBody, kw_only=True, frozen=True):
    """Body of /v1/contexts/{id}/update; with `from_segment` only that one and those behind it are replaced."""

    segments: list[SegmentBody]
    from_segment: str | None = None


class CloseBody(OperationBody, kw_only=True, frozen=True):
    """Body of /v1/contexts/{id}/close; `cursor` is the id of the last event that has arrived already."""

    query: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cursor: int | None = None


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "tool_calls": ([],),
    "refusal": (),
}
"""Options of the OpenAI API that are not supported, with the values that ask for nothing."""


def refuse_unsupported(body: msgspec.Struct, prefix: str = "") -> None:
    """Refuse options that would change the answer in a way that is not implemented.

    Raises:
        InvalidRequest: names the option.
    """
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if value is None or name not in _NEUTRAL:
            continue
        if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[name]):
            raise InvalidRequest(f"{prefix}{name} is not supported with this value", field=f"{prefix}{name}")


Body = TypeVar("Body", bound=msgspec.Struct)
_PATH = re.compile(r"`\$\.?([^`]*)`$")
_FIELD = re.compile(r"field `([^`]*)`")
_NOT_FINITE = re.compile(rb'"(\w{1,64})"\s*:\s*(-?(?:NaN|Infinity))\b', re.ASCII)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def decode(kind: type[Body], raw: bytes) -> Body:
    """Return a body of strict types.

    Raises:
        InvalidRequest: it is not JSON, not UTF-8, or a field is missing, unknown or of another type.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply", field="body") from error
    # Broken JSON, broken UTF-8 and numbers of thousands of digits.
    except ValueError as error:
        raise _broken(raw, error) from error


def _broken(raw: bytes, error: ValueError) -> InvalidRequest:
    """Return the error of a body that is no JSON; names the two slips that JSON writers make."""
    number = _NOT_FINITE.search(raw)
    if number is not None:
        name, value = number[1].decode("ascii"), number[2].decode("ascii")
        return InvalidRequest(f"{name} must be a finite number, found {value}", field=name, limit="a finite number")
    if _SURROGATE.search(raw):
        return InvalidRequest(
            "the body is not valid JSON in UTF-8; a text in it may hold half of a surrogate pair", field="body"
        )
    return InvalidRequest(f"the body is not valid JSON in UTF-8: {_cause(error)}", field="body")


def _cause(error: ValueError) -> str:
    # The text of a UnicodeDecodeError is short and holds no more than one byte of the body.
    return "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _wrong_field(problem: str) -> InvalidRequest:
    """Return the error of a msgspec validation problem, such as "Expected `int`, got `str` - at `$.n`"."""
    found = _PATH.search(problem)
    path = found.group(1) if found else ""
    what = problem.split(" - at ")[0].replace("`", "")
    named = _FIELD.search(problem)
    if named is not None:
        name = f"{path}.{named.group(1)}" if path else named.group(1)
        kind = "missing" if "missing" in what else "unknown or not supported"
        return InvalidRequest(f"field {name} is {kind}", field=name)
    return InvalidRequest(f"{path or 'body'}: {what}", field=path or "body", limit=what)


async def read_body(request: Request, settings: HttpSettings) -> bytes:
    """Return the request's body.

    Raises:
        BodyTooLarge: it is over the limit; at most the limit is ever held in memory. The server
            reads and drops the rest, so that the client sees the answer and not a reset connection.
        BodyTimeout: it takes too long to arrive.
        UnsupportedMedia: it is declared as something else than JSON.
        ClientDisconnect: the client left while sending.
    """
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise UnsupportedMedia(f"Content-Type is {media}; send application/json", field="Content-Type")
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    is_over = declared.isdecimal() and int(declared) > limit
    # A client that asks before it sends gets its answer at once.
    if is_over and "expect" in request.headers:
        raise _too_large(limit)
    kept, most_s = bytearray(), settings.receive_timeout_s
    try:
        async with asyncio.timeout(most_s):
            async for chunk in request.stream():
                is_over = is_over or len(kept) + len(chunk) > limit
                if is_over:
                    raise _too_large(limit)
                kept += chunk
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {most_s:g} s", field="body", limit=f"{most_s:g} s") from None
    return bytes(kept)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes", field="body", limit=f"{limit} bytes")
