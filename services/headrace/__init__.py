"""Disaggregated LLM serving: the client and its errors.

Names are imported at first use: a program that catches an error need not load gRPC, and nothing
here ever loads torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.client.aio import AsyncClient, AsyncStream
    from headrace.client.context import AsyncContext, AsyncContextAnswer
    from headrace.client.sync import Client, Stream
    from headrace.client.values import Answer, Choice, GenerateOptions, MemberInfo, Message, ModelInfo
    from headrace.core.context import ContextState
    from headrace.core.request import FinishReason, Piece, Token, Usage
    from headrace.errors import (
        BlockLost,
        Cancelled,
        ConfigError,
        ContextOverflow,
        DeadlineExceeded,
        Draining,
        HeadraceError,
        InternalError,
        InvalidRequest,
        NotReady,
        Overloaded,
        PeerFailed,
        PeerMismatch,
        Saturated,
        UnknownContext,
        UnknownModel,
    )

    __version__: str

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncContext",
    "AsyncContextAnswer",
    "AsyncStream",
    "BlockLost",
    "Cancelled",
    "Choice",
    "Client",
    "ConfigError",
    "ContextOverflow",
    "ContextState",
    "DeadlineExceeded",
    "Draining",
    "FinishReason",
    "GenerateOptions",
    "HeadraceError",
    "InternalError",
    "InvalidRequest",
    "MemberInfo",
    "Message",
    "ModelInfo",
    "NotReady",
    "Overloaded",
    "PeerFailed",
    "PeerMismatch",
    "Piece",
    "Saturated",
    "Stream",
    "Token",
    "UnknownContext",
    "UnknownModel",
    "Usage",
    "__version__",
]

_HOMES = {
    "headrace.client.aio": ("AsyncClient", "AsyncStream"),
    "headrace.client.context": ("AsyncContext", "AsyncContextAnswer"),
    "headrace.client.sync": ("Client", "Stream"),
    "headrace.client.values": ("Answer", "Choice", "GenerateOptions", "MemberInfo", "Message", "ModelInfo"),
    "headrace.core.context": ("ContextState",),
    "headrace.core.request": ("FinishReason", "Piece", "Token", "Usage"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562)."""
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "headrace.errors")), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("headrace")
    except PackageNotFoundError:
        return "0+source"


def __dir__() -> list[str]:
    return sorted(__all__)
