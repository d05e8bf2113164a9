"""What both clients share of gRPC."""

import asyncio
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import grpc

from headrace.client.attempts import CallPolicy
from headrace.clock import WallClock
from headrace.core.status import CLIENT_OPTIONS, error_of
from headrace.core.tenancy import TENANT_HEADER, tenant_of
from headrace.errors import Cancelled, HeadraceError

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_RETRIES = 3

OPTIONS = CLIENT_OPTIONS


def policy_of(timeout_s: float, retries: int) -> CallPolicy:
    """Return the policy of a client on the machine's clock."""
    jitter = secrets.SystemRandom().random
    return CallPolicy(timeout_s=timeout_s, retries=retries, clock=WallClock(), jitter=jitter)


def metadata_of(tenant: str | None) -> tuple[tuple[str, str], ...]:
    """Return what goes with every request of a tenant.

    Raises:
        InvalidRequest: it is no name of a tenant.
    """
    return () if tenant is None else ((TENANT_HEADER, tenant_of([tenant])),)


@contextmanager
def typed_errors(address: str) -> Iterator[None]:
    """Turn failures of calls into HeadraceErrors.

    Raises:
        HeadraceError: the call failed.
        asyncio.CancelledError: the calling task was cancelled.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise _error_of(error, address) from None
    except (ValueError, grpc.aio.UsageError) as error:
        # What the two flavours of gRPC raise for a channel that was closed before the call.
        if "closed" not in str(error):
            raise
        raise Cancelled(f"the client of {address} is closed") from None
    except asyncio.CancelledError:
        # gRPC raises it into a caller whose channel was closed under it; nobody cancelled the task.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Cancelled(f"the client of {address} was closed during the call") from None


def _error_of(error: grpc.RpcError, address: str) -> HeadraceError:
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return error_of(error.code().name, error.details() or "", metadata, address)
