"""The room that all texts share."""

import pytest

from headrace.errors import Saturated
from headrace.ingestor.parts import TextRoom


@pytest.fixture
def room():
    return TextRoom(100)


def test_texts_count_together(room):
    room.resize("a", 60)
    room.resize("b", 40)
    assert room.num_chars == 100
    with pytest.raises(Saturated) as caught:
        room.resize("b", 41)
    assert caught.value.retry_after_s
    assert room.num_chars == 100


def test_a_text_that_is_gone_makes_room(room):
    room.resize("a", 60)
    room.forget("a")
    room.forget("a")
    room.resize("b", 100)
    assert room.num_chars == 100


def test_a_text_may_always_become_shorter(room):
    room.resize("a", 100)
    room.resize("a", 99)
    room.forget("unknown")
    assert room.num_chars == 99
