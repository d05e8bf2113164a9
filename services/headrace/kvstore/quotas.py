"""How much of the kvstore one tenant may fill. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.core.tenancy import TENANT_LIMIT, is_tenant
from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Most bytes of one tenant's blocks; 0 is no limit."""

    dram_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Limits by tenant. Public blocks are nobody's and have none.

    Attributes:
        common: Of a tenant without one of its own.
        single: Of the others.
    """

    common: Quota = Quota()
    single: Mapping[str, Quota] = field(default_factory=dict)

    def dram_blocks(self, tenant: str, block_bytes: int) -> int | None:
        """Return how many blocks in memory a tenant may have; None is no limit."""
        return _blocks(self._of(tenant).dram_bytes, block_bytes)

    def disk_blocks(self, tenant: str, block_bytes: int) -> int | None:
        """Return how many blocks on disk a tenant may have; None is no limit."""
        return _blocks(self._of(tenant).disk_bytes, block_bytes)

    def _of(self, tenant: str) -> Quota:
        return self.single.get(tenant, self.common) if tenant else Quota()


def parse_quotas(texts: Sequence[str]) -> dict[str, Quota]:
    """Return the quotas of single tenants.

    Args:
        texts: Each `NAME=DRAM_BYTES:DISK_BYTES`.

    Raises:
        ConfigError: one is not of that form, or a tenant has two.
    """
    quotas: dict[str, Quota] = {}
    for text in texts:
        tenant, quota = _parse(text)
        if tenant in quotas:
            raise ConfigError(f"tenant {tenant!r} has two quotas", field="tenant_quotas")
        quotas[tenant] = quota
    return quotas


def _parse(text: str) -> tuple[str, Quota]:
    tenant, _, sizes = text.rpartition("=")
    dram, _, disk = sizes.partition(":")
    if not (is_tenant(tenant) and sizes.isascii() and dram.isdecimal() and disk.isdecimal()):
        raise ConfigError(
            f"a quota is NAME=DRAM_BYTES:DISK_BYTES with a name of {TENANT_LIMIT}, found {text!r}",
            field="tenant_quotas",
        )
    return tenant, Quota(dram_bytes=int(dram), disk_bytes=int(disk))


def _blocks(size_bytes: int, block_bytes: int) -> int | None:
    return size_bytes // block_bytes if size_bytes else None
