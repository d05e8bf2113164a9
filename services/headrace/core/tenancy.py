"""Who shares cached prefixes with whom."""

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from headrace.core.block import length_prefixed
from headrace.errors import InvalidRequest

TENANT_HEADER = "x-tenant-id"
"""HTTP header and gRPC metadata that names the tenant; the router believes it until API keys bind tenants."""

DEFAULT_TENANT = "default"
"""Tenant of requests that name none."""

ALL_TENANTS = "*"

_TAG = b"headrace-tenant-2\0"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
TENANT_LIMIT = "1 to 64 characters of A-Z a-z 0-9 . _ -"


class CacheScope(Enum):
    """Who may reuse the blocks of a request."""

    TENANT = "tenant"
    """Requests of the same tenant with the same `cache_salt`."""
    PUBLIC = "public"
    """Every request of this scope, whoever sends it."""


def tenant_key(cluster_secret: bytes, tenant: str, cache_salt: bytes) -> bytes:
    """Return the 32 bytes that keep the blocks of one tenant and salt apart; docs/block-hash.md states them.

    Args:
        cluster_secret: Without it nobody can compute the hash of a prompt that they guess.
        tenant: Name of the tenant.
        cache_salt: What the request adds; empty is shared by the whole tenant.
    """
    message = _TAG + length_prefixed(tenant.encode()) + length_prefixed(cache_salt)
    return hmac.digest(cluster_secret, message, "sha256")


def is_tenant(name: str) -> bool:
    """Return whether a tenant may have this name."""
    return _TENANT.fullmatch(name) is not None


def tenant_of(named: Sequence[str]) -> str:
    """Return the tenant of a request.

    Args:
        named: All values of the header that the request came with.

    Raises:
        InvalidRequest: more than one, as when a proxy adds its own to the client's; or no name of a tenant.
    """
    if not named:
        return DEFAULT_TENANT
    if len(named) > 1:
        raise InvalidRequest(f"{TENANT_HEADER} is given {len(named)} times; give it once", field=TENANT_HEADER)
    if not is_tenant(named[0]):
        raise InvalidRequest(f"{TENANT_HEADER} must be {TENANT_LIMIT}", field=TENANT_HEADER, limit=TENANT_LIMIT)
    return named[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenancy:
    """The router's rules about tenants.

    Attributes:
        secret: Of the cluster; the same for all its routers.
        public_tenants: Who may use the public scope; `*` is everybody.
    """

    secret: bytes = field(default=b"", repr=False)
    public_tenants: tuple[str, ...] = (ALL_TENANTS,)

    def cache_key(self, tenant: str, scope: CacheScope, cache_salt: bytes) -> bytes:
        """Return what the root of a request's blocks mixes in; empty is the public root.

        Raises:
            InvalidRequest: the tenant may not use the public scope, or a salt is to separate what is public.
        """
        if scope is CacheScope.TENANT:
            return tenant_key(self.secret, tenant, cache_salt)
        if not {tenant, ALL_TENANTS} & set(self.public_tenants):
            raise InvalidRequest(
                f"cache_scope public is not allowed for tenant {tenant}: use cache_scope tenant",
                field="cache_scope",
                limit=CacheScope.TENANT.value,
            )
        if cache_salt:
            raise InvalidRequest(
                "cache_scope public shares a prefix and cache_salt keeps it apart: give one of them",
                field="cache_scope",
            )
        return b""
