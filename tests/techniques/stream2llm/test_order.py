import dataclasses
import itertools

import pytest

from headrace import catalog
from headrace.core.plan import SequenceView
from headrace.core.request import SequenceId
from headrace.errors import ConfigError

FIRST = SequenceView(
    sequence_id=SequenceId("s"),
    arrival=3,
    num_tokens=100,
    num_computed=40,
    num_blocks=7,
    is_running=True,
    revised_s=5.0,
)
NAMES = ("fcfs", "lcas", "mcps")


def ranked(name, **views):
    """Return the names of the views in the order of a policy."""
    order = catalog.load("stream2llm").order(name)
    return sorted(views, key=lambda key: order.key(views[key], 10.0))


@pytest.mark.parametrize("name", NAMES)
def test_closed_prompts_come_before_open_ones_and_these_before_stalled_ones(name):
    late = dataclasses.replace(FIRST, arrival=9, revised_s=9.0, num_computed=0)
    views = {
        "closed": late,
        "open": dataclasses.replace(late, is_open=True),
        "stalled": dataclasses.replace(FIRST, is_open=True, is_stalled=True),
    }
    for some in itertools.permutations(views.items()):
        assert ranked(name, **dict(some)) == ["closed", "open", "stalled"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("fcfs", {"arrival": 2}),
        ("lcas", {"arrival": 8, "revised_s": 4.0}),
        ("mcps", {"arrival": 8, "num_computed": 41}),
    ],
)
@pytest.mark.parametrize("is_open", [False, True])
def test_each_order_looks_at_its_own_thing(name, fields, is_open):
    first = dataclasses.replace(FIRST, is_open=is_open)
    assert ranked(name, first=first, better=dataclasses.replace(first, **fields)) == ["better", "first"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_equal_goes_by_arrival(name):
    assert ranked(name, first=FIRST, better=dataclasses.replace(FIRST, arrival=2)) == ["better", "first"]


def test_an_unknown_order_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="fcfs, lcas, mcps"):
        catalog.load("stream2llm").order("sjf")
