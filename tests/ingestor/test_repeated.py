"""What of an answer that is asked for again is new."""

import random

import pytest

from headrace.core.request import FinishReason, Piece, Token
from headrace.errors import InternalError
from headrace.ingestor.repeated import RepeatedAnswer

WORDS = ("Wa", "ter", " ", "", "runs", " down", "", ".")


def pieces_of(words, cuts=(), *, finish=True, held=0):
    """The pieces of an answer: its tokens cut somewhere, each piece with the text that is certain by then."""
    pieces, shown, start = [], 0, 0
    for end in [*cuts, len(words)]:
        is_last = end == len(words) and finish
        text = "".join(words[: end if is_last else max(0, end - held)])
        tokens = tuple(Token(cursor=place, token_id=100 + place) for place in range(start, end))
        reason = FinishReason.STOP if is_last else None
        pieces.append(Piece(choice=0, text=text[shown:], tokens=tokens, finish=reason))
        shown, start = max(shown, len(text)), end
    return pieces


def test_whatever_attempts_break_off_nothing_is_lost_or_twice():
    for seed in range(200):
        rng = random.Random(seed)
        answer, found = RepeatedAnswer(), []
        for attempt in range(rng.randint(1, 4), 0, -1):
            answer.begin()
            cuts = sorted(rng.sample(range(1, len(WORDS)), rng.randint(0, 5)))
            pieces = pieces_of(WORDS, cuts, held=rng.randint(0, 2))
            brought = pieces if attempt == 1 else pieces[: rng.randrange(len(pieces))]
            found += [answer.fresh(piece) for piece in brought]
        assert "".join(piece.text for piece in found) == "".join(WORDS), seed
        assert [token.cursor for piece in found for token in piece.tokens] == list(range(len(WORDS))), seed
        assert found[-1].finish is FinishReason.STOP


def test_another_token_at_a_place_is_an_error():
    answer = RepeatedAnswer()
    answer.fresh(pieces_of(WORDS, finish=False)[0])
    answer.begin()
    with pytest.raises(InternalError, match="differs"):
        answer.fresh(Piece(choice=0, text="x", tokens=(Token(cursor=1, token_id=7),)))


def test_an_answer_that_is_shorter_the_second_time_is_an_error():
    answer = RepeatedAnswer()
    answer.fresh(pieces_of(WORDS, finish=False)[0])
    answer.begin()
    with pytest.raises(InternalError, match="shorter"):
        answer.fresh(pieces_of(WORDS[:3])[0])
