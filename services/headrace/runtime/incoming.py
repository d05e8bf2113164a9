"""What servicers read of a call before they know what it is about."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc.aio

from headrace.core.tenancy import TENANT_HEADER, tenant_of
from headrace.errors import DeadlineExceeded

FIRST_REQUEST_S = 10.0
"""Longest wait for the request that says what a call is for."""

RequestT = TypeVar("RequestT")


def tenant_of_call(context: "grpc.aio.ServicerContext[object, object]") -> str:
    """Return the tenant that a call names; raises InvalidRequest as `tenant_of`."""
    metadata = context.invocation_metadata() or ()
    return tenant_of([str(value) for key, value in metadata if key == TENANT_HEADER])


async def first_of(requests: AsyncIterator[RequestT]) -> RequestT | None:
    """Return the first request of a call, which should be read before anything is refused.

    A call that ends while its client writes hides from it why.

    Returns:
        None if there is none.

    Raises:
        DeadlineExceeded: it does not come.
    """
    try:
        async with asyncio.timeout(FIRST_REQUEST_S):
            return await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceeded(f"no request came within {FIRST_REQUEST_S:g} s", field="request") from None
