"""What every endpoint needs."""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.clock import Clock
from headrace.core.tenancy import Tenancy
from headrace.core.validate import RequestLimits
from headrace.router.frontend import Frontend, ServedModel
from headrace.router.ingestors import Ingestors
from headrace.runtime.off_loop import INLINE_CHARS


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Bounds of the HTTP front.

    Attributes:
        tenancy: Rules about tenants.
        max_body_bytes: Larger request bodies are refused with 413 while they are read.
        receive_timeout_s: Bodies that take longer to arrive are refused with 408.
        max_prompts: Most prompts in one completions request.
        inline_chars: Longer texts are tokenized off the event loop.
        default_timeout_s: Deadline of requests that name none.
        max_timeout_s: Longest deadline a request may name.
    """

    tenancy: Tenancy
    max_body_bytes: int = 8 * 1024 * 1024
    receive_timeout_s: float = 60.0
    max_prompts: int = 32
    # 8,000 characters take about 2 ms to tokenize (2 cores, 2026-11-21).
    inline_chars: int = INLINE_CHARS
    default_timeout_s: float = 600.0
    max_timeout_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpContext:
    """The parts that endpoints share.

    Attributes:
        metrics: Returns the Prometheus text.
        entropy: Returns 64 random bits, for seeds and ids.
        started_unix_s: When the application was made.
        ingestors: Keep contexts that still arrive; None where there are none.
    """

    frontend: Frontend
    clock: Clock
    metrics: Callable[[], bytes]
    settings: HttpSettings
    entropy: Callable[[], int]
    started_unix_s: int
    ingestors: Ingestors | None

    def limits(self, model: ServedModel) -> RequestLimits:
        """Return what one request may ask of a model."""
        return model.limits(self.settings.default_timeout_s, self.settings.max_timeout_s)
