"""Turn calls of the SDK into messages and messages into its values; no I/O."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtobufMessage

from headrace.client.values import GenerateOptions, MemberInfo, Message, ModelInfo
from headrace.errors import InvalidRequest
from headrace.v1 import cluster_pb2, generate_pb2, ingestor_pb2, router_pb2

DEFAULT_TEMPERATURE = 1.0

Text: TypeAlias = str | bytes | bytearray | memoryview
"""Text to send: characters, or UTF-8."""

_MODES = {"append": ingestor_pb2.CONTEXT_MODE_APPEND, "update": ingestor_pb2.CONTEXT_MODE_UPDATE}
_MOST_TIMEOUT_S = 4_000_000.0

_CALL_OPTIONS = frozenset({"model", "stop", "n", "timeout_s", "request_id", "cache_salt", "cache_scope"})
_OPTIONS = frozenset(GenerateOptions.__annotations__)
_AT_LEAST_ONE = ("max_tokens", "n")
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: "a whole number from -2^31 to 2^31 - 1",
    FieldDescriptor.CPPTYPE_INT64: "a whole number from -2^63 to 2^63 - 1",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number from 0 to 2^32 - 1",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number from 0 to 2^64 - 1",
}


def text_request(prompt: str | Sequence[int], options: GenerateOptions) -> router_pb2.GenerateRequest:
    """Ask for the continuation of a text or of tokens.

    Raises:
        InvalidRequest: an option is unknown or cannot be written; the router checks ranges.
    """
    request = router_pb2.GenerateRequest()
    if isinstance(prompt, str):
        _put(request, "text", "prompt", prompt)
    else:
        request.tokens.SetInParent()
        _put(request.tokens, "token_ids", "prompt", prompt)
    _fill(request, options)
    return request


def chat_request(messages: Iterable[Message], options: GenerateOptions) -> router_pb2.GenerateRequest:
    """Ask for the next message of a chat; raises as `text_request`."""
    request = router_pb2.GenerateRequest()
    _put_chat(request.chat, messages)
    _fill(request, options)
    return request


def tokenize_request(source: str | Iterable[Message], model: str | None) -> router_pb2.TokenizeRequest:
    """Ask for the tokens of a text or of a chat."""
    request = router_pb2.TokenizeRequest(model=model or "")
    if isinstance(source, str):
        _put(request, "text", "text", source)
    else:
        _put_chat(request.chat, source)
    return request


def detokenize_request(token_ids: Sequence[int], model: str | None) -> router_pb2.DetokenizeRequest:
    """Ask for the text of tokens."""
    request = router_pb2.DetokenizeRequest(model=model or "")
    _put(request, "token_ids", "token_ids", token_ids)
    return request


def context_request(
    prefix: str, chat: Iterable[Message] | None, mode: str, options: GenerateOptions
) -> ingestor_pb2.OpenContext:
    """Open a context.

    Raises:
        InvalidRequest: an option is unknown or cannot be written, or both a prefix and a chat are given.
    """
    if mode not in _MODES:
        raise InvalidRequest(f"mode is {mode!r}: it must be append or update", field="mode", limit="append or update")
    opening = ingestor_pb2.OpenContext(mode=_MODES[mode])
    if chat is not None:
        if prefix:
            raise InvalidRequest("give a prefix or a chat before the context, not both", field="prefix")
        _put_chat(opening.request.chat, chat)
    elif prefix:
        _put(opening.request, "text", "prefix", prefix)
    _fill(opening.request, options)
    timeout_s = options.get("timeout_s")
    if timeout_s is not None:
        if not 0 < timeout_s < _MOST_TIMEOUT_S:
            limit = f"above 0 and below {_MOST_TIMEOUT_S:g}"
            raise InvalidRequest(f"timeout_s is {timeout_s}: it must be {limit}", field="timeout_s", limit=limit)
        opening.timeout_ms = max(1, round(timeout_s * 1000))
    return opening


def segments_of(segments: Iterable[tuple[str, Text]]) -> list[ingestor_pb2.ContextSegment]:
    """Write segments; raises InvalidRequest for one that is no pair of a name and a text."""
    written = []
    for index, segment in enumerate(segments):
        field = f"segments[{index}]"
        try:
            segment_id, text = segment
        except (TypeError, ValueError):
            raise InvalidRequest(f"{field} must be a pair of a name and a text", field=field) from None
        message = ingestor_pb2.ContextSegment(text=utf8(text, f"{field}.text"))
        _put(message, "id", f"{field}.id", segment_id)
        written.append(message)
    return written


def utf8(text: Text, field: str) -> bytes:
    """Return text as bytes; raises InvalidRequest if it has none in UTF-8."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    try:
        return text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"{field} cannot be sent: {error}", field=field) from None


def model_of(card: router_pb2.ModelCard) -> ModelInfo:
    """Read a model."""
    return ModelInfo(name=card.name, max_context_tokens=card.max_context_tokens, fingerprint=card.fingerprint)


def member_of(member: router_pb2.ClusterMember) -> MemberInfo:
    """Read a process of the cluster; a role that only newer peers know is its number."""
    load, ledger = member.load, member.load.ledger
    is_known = member.role in cluster_pb2.Role.values()
    role = cluster_pb2.Role.Name(member.role).removeprefix("ROLE_").lower() if is_known else str(member.role)
    return MemberInfo(
        name=member.name,
        role=role,
        address=member.address,
        is_connected=member.is_connected,
        is_ready=load.is_ready,
        not_ready_reason=load.not_ready_reason,
        is_draining=load.is_draining,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        total_blocks=ledger.total,
        free_blocks=ledger.free,
        cached_blocks=ledger.cached,
        leased_blocks=ledger.leased,
    )


def _fill(request: router_pb2.GenerateRequest, options: GenerateOptions) -> None:
    request.sampling.temperature = DEFAULT_TEMPERATURE
    for name, value in options.items():
        if name not in _OPTIONS:
            raise InvalidRequest(f"unknown option {name!r}: known are {', '.join(sorted(_OPTIONS))}", field=name)
        if value is None or name == "timeout_s":
            continue
        if name in _AT_LEAST_ONE and value == 0:
            # 0 is how the wire says "not given"; sent as it is, it would ask for the opposite of nothing.
            raise InvalidRequest(f"{name} is 0: it must be at least 1", field=name, limit="1")
        if name in _CALL_OPTIONS:
            _put_call_option(request, name, value)
        else:
            _put_sampling(request.sampling, name, value)


def _put_call_option(request: router_pb2.GenerateRequest, name: str, value: object) -> None:
    if name == "n":
        _put(request, "num_choices", name, value)
    elif name == "stop":
        _put(request, name, name, (value,) if isinstance(value, str) else value)
    else:
        _put(request, name, name, value)


def _put_sampling(sampling: generate_pb2.SamplingParams, name: str, value: object) -> None:
    if name == "top_k" and value == -1:
        return
    if name == "seed" and isinstance(value, int) and value < 0:
        value %= 2**64
    _put(sampling, name, name, value)


def _put_chat(chat: router_pb2.ChatPrompt, messages: Iterable[Message]) -> None:
    chat.SetInParent()
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise InvalidRequest(f"{field} must be a mapping with the keys role and content", field=field)
        added = chat.messages.add()
        for key, text in message.items():
            _put(added, key, f"{field}.{key}", text)


def _put(message: ProtobufMessage, attribute: str, field: str, value: object) -> None:
    """Write one attribute of a protobuf message; what does not fit its type is the caller's mistake."""
    try:
        if isinstance(value, Mapping):
            getattr(message, attribute).update(value)
        elif isinstance(value, str) or not isinstance(value, Iterable):
            setattr(message, attribute, value)
        else:
            getattr(message, attribute).extend(value)
    except (TypeError, ValueError, AttributeError) as error:
        limit = _RANGES.get(message.DESCRIPTOR.fields_by_name[attribute].cpp_type)
        if limit is not None and isinstance(value, int):
            raise InvalidRequest(f"{field} must be {limit}, found {value}", field=field, limit=limit) from None
        raise InvalidRequest(f"{field} cannot be sent: {error}", field=field) from None
