"""Fold a stream of pieces into an answer; no I/O."""

from headrace.client.values import Answer, Choice
from headrace.core.request import FinishReason, Piece, Token, Usage
from headrace.core.wire import piece_from_proto
from headrace.errors import InternalError
from headrace.v1 import router_pb2


class AnswerFold:
    """Collects one call's responses.

    Args:
        num_choices: Answers asked for.
        begun_s: When the call began.
    """

    def __init__(self, num_choices: int, begun_s: float) -> None:
        self._begun_s = begun_s
        self._first_s: float | None = None
        self._request_id = ""
        self._model = ""
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._tokens: list[list[Token]] = [[] for _ in range(num_choices)]
        self._finishes: list[FinishReason | None] = [None] * num_choices
        self._usage: Usage | None = None

    def add(self, response: router_pb2.GenerateResponse, now_s: float) -> Piece:
        """Take the next response in and return it as a value.

        Raises:
            InternalError: it belongs to a choice that was not asked for.
        """
        piece = piece_from_proto(response)
        if piece.choice >= len(self._texts):
            raise InternalError(f"router sent choice {piece.choice} of {len(self._texts)}")
        if self._first_s is None and piece.tokens:
            self._first_s = now_s
        self._request_id = response.request_id or self._request_id
        self._model = response.model or self._model
        self._texts[piece.choice].append(piece.text)
        self._tokens[piece.choice].extend(piece.tokens)
        self._finishes[piece.choice] = piece.finish or self._finishes[piece.choice]
        self._usage = piece.usage or self._usage
        return piece

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return None not in self._finishes

    def answer(self, now_s: float) -> Answer:
        """Return the whole answer.

        Raises:
            InternalError: the stream ended in the middle of a choice.
        """
        choices: list[Choice] = []
        for texts, tokens, finish in zip(self._texts, self._tokens, self._finishes, strict=True):
            if finish is None:
                raise InternalError("the router's stream ended before its answer did")
            choices.append(Choice(text="".join(texts), tokens=tuple(tokens), finish=finish))
        first_s = now_s if self._first_s is None else self._first_s
        return Answer(
            request_id=self._request_id,
            model=self._model,
            choices=tuple(choices),
            usage=self._usage,
            ttft_s=first_s - self._begun_s,
            total_s=now_s - self._begun_s,
        )
