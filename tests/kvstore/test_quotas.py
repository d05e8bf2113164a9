"""How quotas are written and what they mean."""

import pytest

from headrace.errors import ConfigError
from headrace.kvstore.quotas import Quota, Quotas, parse_quotas


def test_a_tenant_has_its_own_quota_or_the_common_one_and_public_blocks_have_none():
    quotas = Quotas(common=Quota(dram_bytes=1000), single=parse_quotas(["a=250:0", "b=0:999"]))
    assert [quotas.dram_blocks(tenant, 100) for tenant in ("a", "b", "c", "")] == [2, None, 10, None]
    assert [quotas.disk_blocks(tenant, 100) for tenant in ("a", "b", "c", "")] == [None, 9, None, None]


@pytest.mark.parametrize("text", ["a", "a=1", "=1:2", "a=1:", "a=-1:2", "a=1:2:3"])
def test_what_is_no_quota_is_refused(text):
    with pytest.raises(ConfigError):
        parse_quotas([text])
