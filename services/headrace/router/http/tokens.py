"""POST /tokenize and POST /detokenize, in vLLM's form."""

from starlette.requests import Request
from starlette.responses import Response

from headrace.errors import InvalidRequest
from headrace.router.frontend import ServedModel
from headrace.router.http.bodies import DetokenizeBody, TokenizeBody, decode, read_body
from headrace.router.http.context import HttpContext
from headrace.router.http.logprobs import token_text
from headrace.router.http.prompts import chat_tokens, text_tokens
from headrace.router.http.sse import encode_json
from headrace.router.tokens import detokenize as detokenized


async def tokenize(request: Request, context: HttpContext) -> Response:
    """Turn a text or a chat into token ids.

    Raises:
        InvalidRequest: not exactly one of `prompt` and `messages` is given.
    """
    body = decode(TokenizeBody, await read_body(request, context.settings))
    model = context.frontend.model(body.model)
    ids = await _ids(body, model, context)
    strings = [token_text(model.text, token_id) for token_id in ids] if body.return_token_strs else None
    value = {"count": len(ids), "max_model_len": model.max_context_tokens, "tokens": ids, "token_strs": strings}
    return Response(encode_json(value), media_type="application/json")


async def _ids(body: TokenizeBody, model: ServedModel, context: HttpContext) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give exactly one of prompt and messages", field="prompt")
    if body.messages is not None:
        has_end = body.add_generation_prompt is not False
        return await chat_tokens(model, body.messages, add_generation_prompt=has_end, context=context)
    add_special = body.add_special_tokens is not False
    return await text_tokens(model, body.prompt or "", add_special=add_special, context=context)


async def detokenize(request: Request, context: HttpContext) -> Response:
    """Turn token ids into text, special tokens included.

    Raises:
        InvalidRequest: an id is not in the vocabulary, or there are more than the context holds.
    """
    body = decode(DetokenizeBody, await read_body(request, context.settings))
    model = context.frontend.model(body.model)
    text = detokenized(model, body.tokens, "tokens")
    return Response(encode_json({"prompt": text}), media_type="application/json")
