"""From a request's fields to checked generation requests."""

from collections.abc import Sequence
from dataclasses import replace

from starlette.requests import Request

from headrace.core.request import GenerationRequest
from headrace.core.tenancy import TENANT_HEADER, tenant_of
from headrace.core.validate import RequestDraft, build_request
from headrace.errors import InvalidRequest
from headrace.router.frontend import ServedModel
from headrace.router.http.bodies import Message, SamplingBody, refuse_unsupported
from headrace.router.http.context import HttpContext
from headrace.router.http.request_id import internal_id
from headrace.runtime.off_loop import off_loop

TIMEOUT_HEADER = "X-Request-Timeout"
# `developer` is OpenAI's newer word for `system`; templates know only the old one.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def chat_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as templates take them; text parts of one message are joined by line ends.

    Raises:
        InvalidRequest: no messages, or a role, a part or an option that is not supported.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least 1 message, found 0", field="messages", limit="at least 1")
    return [_chat_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _chat_message(message: Message, path: str) -> dict[str, str]:
    role = _ROLES.get(message.role)
    if role is None:
        allowed = ", ".join(_ROLES)
        raise InvalidRequest(f"{path}.role must be one of {allowed}", field=f"{path}.role", limit=allowed)
    refuse_unsupported(message, f"{path}.")
    if message.content is None:
        raise InvalidRequest(f"{path}.content must be a text or a list of text parts", field=f"{path}.content")
    known = {"role": role, "content": _content(message, path)}
    return known if message.name is None else {**known, "name": message.name}


def _content(message: Message, path: str) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    texts: list[str] = []
    for index, part in enumerate(message.content):
        where = f"{path}.content[{index}]"
        if part.type != "text":
            raise InvalidRequest(f"{where}.type must be text; other parts are not supported", field=f"{where}.type")
        if part.text is None:
            raise InvalidRequest(f"{where}.text is missing", field=f"{where}.text")
        texts.append(part.text)
    return "\n".join(texts)


async def chat_tokens(
    model: ServedModel, messages: Sequence[Message], *, add_generation_prompt: bool, context: HttpContext
) -> list[int]:
    """Return the tokens of a rendered chat.

    Raises:
        InvalidRequest: as `chat_messages`, or the template refuses the messages.
    """
    rendered = chat_messages(messages)
    num_chars = sum(len(message["content"]) for message in rendered)
    return await off_loop(
        num_chars,
        lambda: model.text.chat_tokens(rendered, add_generation_prompt=add_generation_prompt),
        context.settings.inline_chars,
    )


async def text_tokens(model: ServedModel, text: str, *, add_special: bool, context: HttpContext) -> list[int]:
    """Return the tokens of a plain text."""
    inline_chars = context.settings.inline_chars
    return await off_loop(len(text), lambda: model.text.encode(text, add_special=add_special), inline_chars)


def timeout_s(body: SamplingBody, request: Request) -> float | None:
    """Return the shorter of the timeouts in body and header, if any is given.

    Raises:
        InvalidRequest: the header is not a number of seconds.
    """
    header = request.headers.get(TIMEOUT_HEADER)
    given = [] if body.timeout is None else [body.timeout]
    if header is not None:
        try:
            given.append(float(header))
        except ValueError as error:
            raise InvalidRequest(f"{TIMEOUT_HEADER} must be a number of seconds", field=TIMEOUT_HEADER) from error
        # min() below would drop a NaN depending on its place.
        if given[-1] != given[-1]:
            raise InvalidRequest(f"{TIMEOUT_HEADER} must be a number of seconds, found nan", field=TIMEOUT_HEADER)
    return min(given, default=None)


def request_draft(body: SamplingBody, request: Request, context: HttpContext) -> RequestDraft:
    """Return the fields that chat and completions share, still without a prompt.

    Raises:
        InvalidRequest: the timeout header is not a number, or the tenant's no name.
    """
    return RequestDraft(
        request_id=internal_id(request),
        prompt=(),
        fresh_seed=context.entropy(),
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        max_tokens=body.max_tokens,
        min_tokens=body.min_tokens,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        seed=body.seed,
        num_choices=body.n,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
        timeout_s=timeout_s(body, request),
        cache_salt=body.cache_salt,
        cache_scope=body.cache_scope,
        tenant=tenant_of(request.headers.getlist(TENANT_HEADER)),
    )


def generation_requests(
    draft: RequestDraft, prompts: Sequence[Sequence[int]], model: ServedModel, context: HttpContext
) -> tuple[GenerationRequest, ...]:
    """Return one checked request per prompt; without a given seed each prompt has its own.

    Raises:
        InvalidRequest: a value is out of range.
    """
    limits, tenancy, now_unix_ms = context.limits(model), context.settings.tenancy, context.clock.unix_ms()
    drafts = [replace(draft, prompt=prompts[0])] if len(prompts) == 1 else _numbered(draft, prompts, context)
    return tuple(build_request(each, limits, tenancy, now_unix_ms=now_unix_ms) for each in drafts)


def _numbered(draft: RequestDraft, prompts: Sequence[Sequence[int]], context: HttpContext) -> list[RequestDraft]:
    return [
        replace(draft, prompt=prompt, request_id=f"{draft.request_id}-{index}", fresh_seed=context.entropy())
        for index, prompt in enumerate(prompts)
    ]
