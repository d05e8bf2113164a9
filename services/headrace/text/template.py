"""Chat templates: a model's Jinja2 source, run in a sandbox with bounds."""

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.clock import Clock
from headrace.errors import ConfigError, InvalidRequest

# No template can name this variable: it holds a space.
_BUDGET = "render budget"
_LOOP_FILTER = "bounded loop"


class _TooMuch(Exception):
    """A bound of the render was passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """Bounds of one render.

    Attributes:
        max_chars: Longest output, also of one repeated string inside the template.
        max_seconds: Longest time.
    """

    max_chars: int = 16 * 1024 * 1024
    max_seconds: float = 2.0


class _Budget:
    """Owns the end of one render."""

    def __init__(self, clock: Clock, limits: RenderLimits) -> None:
        self._clock = clock
        self._end_s = clock.now() + limits.max_seconds
        self.limits = limits

    def check(self) -> None:
        if self._clock.now() > self._end_s:
            raise _TooMuch(f"it ran longer than {self.limits.max_seconds} s")


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose loops, calls and repetitions ask the budget of the render.

    Jinja2 offers no time limit and a render cannot be interrupted from outside, so each
    `for` of the template is rewritten to draw its items through a filter that checks.
    """

    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _LOOP_FILTER, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        _budget(__context).check()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> object:  # noqa: ANN401
        limit = _budget(context).limits.max_chars
        if operator == "**" and (abs(left) > limit or abs(right) > limit.bit_length()):
            raise _TooMuch("a power is too large")
        if operator == "*" and _repeated(left, right) > limit:
            raise _TooMuch(f"a repetition is longer than {limit}")
        return super().call_binop(context, operator, left, right)


def _budget(context: Context) -> _Budget:
    budget = context.get(_BUDGET)
    if not isinstance(budget, _Budget):
        raise _TooMuch("it runs outside a render")
    return budget


def _repeated(left: object, right: object) -> int:
    """Return the length of a repeated sequence, or 0 for a product of numbers."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(times, int):
            return len(items) * times
    return 0


@pass_context
def _bounded(context: Context, items: Iterable[object]) -> Iterator[object]:
    budget = _budget(context)
    for item in items:
        budget.check()
        yield item


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(
    value: object, ensure_ascii: object = None, indent: int | None = None, separators: tuple[str, str] | None = None
) -> str:
    # Jinja2's own filter escapes HTML, which would put < into prompts as <.
    return json.dumps(value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators)


class ChatTemplate:
    """A compiled chat template; immutable.

    Args:
        source: Jinja2 text of the model.
        constants: Texts that the template may name, such as `bos_token`.
        clock: Bounds the render and answers `strftime_now` (in UTC).
        limits: Bounds of one render.

    Raises:
        ConfigError: the source is not a template.
    """

    def __init__(
        self, source: str, *, constants: Mapping[str, str], clock: Clock, limits: RenderLimits | None = None
    ) -> None:
        self._clock = clock
        self._limits = limits or RenderLimits()
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
        )
        environment.filters[_LOOP_FILTER] = _bounded
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            constants, raise_exception=_raise_exception, strftime_now=_strftime(clock), tools=None, documents=None
        )
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}", field="chat_template") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt text of a chat.

        Raises:
            InvalidRequest: the template refuses the messages, fails on them, or passes a bound.
        """
        values = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            _BUDGET: _Budget(self._clock, self._limits),
        }
        try:
            return self._collect(self._template.generate(values))
        except SecurityError as error:
            raise InvalidRequest("the chat template does something forbidden", field="messages") from error
        except _TooMuch as error:
            raise InvalidRequest(f"the chat template was stopped: {error}", field="messages") from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}", field="messages") from error
        except RecursionError as error:
            raise InvalidRequest("the chat template recurses without end", field="messages") from error

    def _collect(self, pieces: Iterable[str]) -> str:
        budget = _Budget(self._clock, self._limits)
        kept: list[str] = []
        num_chars = 0
        for piece in pieces:
            budget.check()
            num_chars += len(piece)
            if num_chars > self._limits.max_chars:
                raise _TooMuch(f"its output is longer than {self._limits.max_chars} characters")
            kept.append(piece)
        return "".join(kept)


def _strftime(clock: Clock) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        return datetime.datetime.fromtimestamp(clock.unix_ms() / 1000, tz=datetime.UTC).strftime(form)

    return strftime_now
