"""Checks of texts and tokens, for both front doors."""

from collections.abc import Sequence

from headrace.core.validate import RequestLimits, check_prompt_length
from headrace.errors import InvalidRequest
from headrace.router.frontend import ServedModel


def refuse_long_text(model: ServedModel, texts: Sequence[str], name: str, limits: RequestLimits) -> None:
    """Refuse text that cannot fit the context before time goes into tokenizing it.

    Raises:
        InvalidRequest: the texts together are too long for the context.
    """
    num_tokens = sum(model.text.min_num_tokens(text) for text in texts)
    check_prompt_length(num_tokens, limits, name=name)


def detokenize(model: ServedModel, ids: Sequence[int], name: str) -> str:
    """Return the text of token ids, special tokens included.

    Args:
        model: Whose tokens they are.
        ids: No more than the context holds: decoding holds the interpreter lock.
        name: What the client calls them.

    Raises:
        InvalidRequest: there are too many, or one is not in the vocabulary.
    """
    if len(ids) > model.max_context_tokens:
        limit = f"at most {model.max_context_tokens} tokens"
        raise InvalidRequest(f"{name} must be {limit}, found {len(ids)}", field=name, limit=limit)
    wrong = next((index for index in ids if not 0 <= index < model.text.vocab_size), None)
    if wrong is not None:
        limit = f"token ids from 0 to {model.text.vocab_size - 1}"
        raise InvalidRequest(f"{name} must be {limit}, found {wrong}", field=name, limit=limit)
    return model.text.decode(list(ids), skip_special=False)
