"""The prompt around a context: what stands before it, and what the model's chat template makes of both."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from headrace.core.common_prefix import num_common
from headrace.errors import InvalidRequest
from headrace.text.model import TextModel


class PromptText(Protocol):
    """Puts a context into its prompt."""

    def begun(self, context: str) -> str:
        """Return the prompt up to the end of a context that may go on.

        Raises:
            InvalidRequest: the model cannot take it.
        """
        ...

    def whole(self, context: str, query: str) -> str:
        """Return the prompt of a context that is complete, with the query behind it.

        Raises:
            InvalidRequest: the model cannot take it.
        """
        ...


class PlainPrompt:
    """Text before the context, the context, the query: nothing between them.

    Args:
        prefix: What stands before the context.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def begun(self, context: str) -> str:
        """Return prefix and context."""
        return self._prefix + context

    def whole(self, context: str, query: str) -> str:
        """Return prefix, context and query."""
        return self._prefix + context + query


_ONE, _OTHER = "x", "y y"
"""Two ways in which a context may go on. Templates trim what the user says, change it, show it twice or count its
words: the prompt that is certain is what they make of both."""


class ChatPrompt:
    """Messages, then one of the user that is context and query.

    Args:
        model: Whose chat template is used.
        messages: Before that of the user, each with `role` and `content`.

    Raises:
        InvalidRequest: the model has no chat template, or it refuses the messages.
    """

    def __init__(self, model: TextModel, messages: Sequence[Mapping[str, str]]) -> None:
        self._model = model
        self._messages = list(messages)
        if self._render(_ONE) == self._render(_OTHER):
            raise InvalidRequest("the chat template leaves out what the user says", field="messages")

    def begun(self, context: str) -> str:
        """Return the rendered chat up to where it depends on how the context goes on."""
        one, other = self._render(context + _ONE), self._render(context + _OTHER)
        return one[: num_common(one, other)]

    def whole(self, context: str, query: str) -> str:
        """Return the rendered chat, up to where the answer begins."""
        return self._render(context + query)

    def _render(self, content: str) -> str:
        return self._model.render_chat([*self._messages, {"role": "user", "content": content}])
