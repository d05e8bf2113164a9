"""What the HTTP and gRPC servers ask of the router; they translate and decide nothing."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from headrace.core.request import ContextProgress, GenerationRequest, Piece, Revision
from headrace.core.validate import RequestLimits
from headrace.text.model import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that the cluster serves now.

    Attributes:
        name: What requests call it.
        max_context_tokens: Most tokens of prompt and answer together.
        fingerprint: Digest of weights, dtype, layout and kernels.
        text: Tokenizer and chat template.
    """

    name: str
    max_context_tokens: int
    fingerprint: str
    text: TextModel

    def limits(self, default_timeout_s: float, max_timeout_s: float) -> RequestLimits:
        """Return what requests for this model may ask for."""
        return RequestLimits(
            model=self.name,
            max_context_tokens=self.max_context_tokens,
            vocab_size=self.text.vocab_size,
            default_timeout_s=default_timeout_s,
            max_timeout_s=max_timeout_s,
        )


class Frontend(Protocol):
    """The router's own verbs."""

    def models(self) -> tuple[ServedModel, ...]:
        """Return the models served; empty until a worker has been met."""
        ...

    def model(self, name: str | None) -> ServedModel:
        """Return a model by name; None is the only one served.

        Raises:
            UnknownModel: no such model.
            NotReady: no worker has been met yet.
        """
        ...

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """Generate. Closing the iterator (or cancelling its task) stops all work of the request.

        Raises (from the first step of the iterator):
            InvalidRequest, Saturated, DeadlineExceeded, PeerFailed, InternalError.
        """
        ...

    def submit_context(
        self, request: GenerationRequest, num_final: int, revisions: AsyncIterator[Revision]
    ) -> AsyncGenerator[Piece | ContextProgress, None]:
        """Generate from a prompt that still arrives. Closing the iterator stops all its work.

        Args:
            request: One choice; its prompt may be empty.
            num_final: Leading tokens of it that stay.
            revisions: What becomes of the prompt; the last one closes it. Errors that it raises end the request.

        Raises (from the first step of the iterator):
            InvalidRequest, Saturated, DeadlineExceeded, PeerFailed, InternalError.
        """
        ...

    def not_ready_reason(self) -> str | None:
        """Return why the cluster cannot answer now, or None when it can."""
        ...
