import pytest

from headrace.clock import VirtualClock
from headrace.errors import ConfigError, InvalidRequest
from headrace.text.template import ChatTemplate, RenderLimits

USER = [{"role": "user", "content": "hi <b> & 'you'"}]


class TickingClock(VirtualClock):
    """Moves a millisecond at every look."""

    def now(self) -> float:
        self.advance(0.001)
        return super().now()


def template(source: str, **limits: float) -> ChatTemplate:
    bounds = RenderLimits(**limits) if limits else None
    return ChatTemplate(source, constants={"bos_token": "<s>"}, clock=TickingClock(1_000_000.0), limits=bounds)


def test_contents_are_not_escaped():
    assert template("{{ bos_token }}{{ messages[0].content }}").render(USER) == "<s>hi <b> & 'you'"


def test_the_names_that_model_templates_use_are_there():
    source = (
        "{% for m in messages %}{% if loop.last %}{{ m | tojson }}{% endif %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y-%m-%d') }}{{ loop is defined }}{% if tools %}x{% endif %}"
    )
    assert template(source).render(USER) == '{"role": "user", "content": "hi <b> & \'you\'"}1970-01-12False'


def test_json_keeps_characters_outside_ascii():
    assert template("{{ messages[0].content | tojson }}").render([{"role": "user", "content": "é<"}]) == '"é<"'


def test_loops_still_know_their_length_and_place():
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ',' }}{% endfor %}"
    assert template(source).render(USER * 3) == "1/3,2/3,3/3"


def test_raise_exception_becomes_an_invalid_request():
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template("{{ raise_exception('roles must alternate') }}").render(USER)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_escapes_and_failures_become_invalid_requests(source):
    with pytest.raises(InvalidRequest):
        template(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in messages * 99999 %}{% for b in messages * 99999 %}{% set x = b %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_works_without_output_is_stopped(source):
    with pytest.raises(InvalidRequest, match="longer than"):
        template(source, max_seconds=0.5).render(USER)


@pytest.mark.parametrize(
    "source", ["{% for a in range(9999) %}xxxxxxxx{% endfor %}", "{{ 'x' * 10**9 }}", "{{ 7 ** 10**7 }}"]
)
def test_output_and_repetition_are_bounded(source):
    with pytest.raises(InvalidRequest, match="stopped"):
        template(source, max_chars=1000, max_seconds=1e9).render(USER)


def test_a_broken_source_refuses_to_load():
    with pytest.raises(ConfigError, match="does not compile"):
        template("{% for %}")
