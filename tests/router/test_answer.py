"""Tokens to text: nothing half, nothing of a stop, nothing after it."""

import pytest

from headrace.core.request import FinishReason, Token
from headrace.router.answer import ChoiceText
from headrace.testing.text import byte_text_model


@pytest.fixture
def model(tmp_path):
    return byte_text_model(tmp_path)


def push(choice, model, text, start=0, finish=None):
    """Push the bytes of a text, one token each, in one batch."""
    ids = model.encode(text)
    last = len(ids) - 1
    return choice.push(
        tuple(
            Token(cursor=start + index, token_id=token, finish=finish if index == last else None)
            for index, token in enumerate(ids)
        )
    )


def test_half_a_character_is_held_back(model):
    choice = ChoiceText(0, model, ())
    tokens = tuple(Token(cursor=index, token_id=token) for index, token in enumerate(model.encode("é")))
    assert [choice.push((token,)).text for token in tokens] == ["", "é"]


def test_a_stop_text_is_not_shown_and_drops_what_follows(model):
    choice = ChoiceText(0, model, ("END",))
    piece = push(choice, model, "abENDxyz")
    assert (piece.text, piece.finish, len(piece.tokens)) == ("ab", FinishReason.STOP, 5)
    assert choice.is_finished
    assert choice.num_tokens == 5


def test_the_beginning_of_a_stop_text_is_held_back_until_it_is_none(model):
    choice = ChoiceText(0, model, ("END",))
    assert push(choice, model, "abEN").text == "ab"
    assert push(choice, model, "C", 4).text == "ENC"


def test_what_was_held_back_is_shown_at_the_end(model):
    choice = ChoiceText(3, model, ("END",))
    piece = push(choice, model, "abEN", finish=FinishReason.LENGTH)
    assert (piece.choice, piece.text, piece.finish) == (3, "abEN", FinishReason.LENGTH)


def test_a_stop_text_completed_by_the_last_token_is_a_stop(model):
    choice = ChoiceText(0, model, ("END",))
    piece = push(choice, model, "abEND", finish=FinishReason.LENGTH)
    assert (piece.text, piece.finish) == ("ab", FinishReason.STOP)


def test_the_token_that_stopped_the_model_is_no_text(model):
    choice = ChoiceText(0, model, ())
    piece = push(choice, model, "ab", finish=FinishReason.STOP)
    assert (piece.text, len(piece.tokens)) == ("a", 2)
