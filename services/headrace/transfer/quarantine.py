"""Which own blocks a transport may still touch, and who waits for them."""

from collections.abc import Callable, Sequence


class Quarantine:
    """Counts unsettled transfers by block; lives on one event loop."""

    def __init__(self) -> None:
        self._next_token = 0
        self._unsettled: dict[int, frozenset[int]] = {}
        self._waiting: list[tuple[set[int], Callable[[], None]]] = []

    @property
    def num_unsettled(self) -> int:
        """Transfers begun and not settled."""
        return len(self._unsettled)

    def enter(self, block_ids: Sequence[int]) -> int:
        """Count a transfer that begins; return its token for `leave`."""
        self._next_token += 1
        self._unsettled[self._next_token] = frozenset(block_ids)
        return self._next_token

    def leave(self, token: int) -> None:
        """A transfer has settled; those that waited for it alone are called."""
        self._unsettled.pop(token, None)
        waiting, self._waiting = self._waiting, []
        for tokens, call in waiting:
            tokens.discard(token)
            if tokens:
                self._waiting.append((tokens, call))
            else:
                call()

    def when_settled(self, block_ids: Sequence[int], call: Callable[[], None]) -> None:
        """Call `call` once the transfers now unsettled on these blocks have left; at once when there are none."""
        wanted = frozenset(block_ids)
        tokens = {token for token, blocks in self._unsettled.items() if not wanted.isdisjoint(blocks)}
        if tokens:
            self._waiting.append((tokens, call))
        else:
            call()
