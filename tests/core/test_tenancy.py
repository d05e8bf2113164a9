"""Tenants share nothing unless they say so."""

import pytest

from headrace.core.block import block_hashes, root_hash
from headrace.core.tenancy import DEFAULT_TENANT, CacheScope, Tenancy, tenant_key, tenant_of
from headrace.errors import InvalidRequest

TENANCY = Tenancy(secret=b"secret", public_tenants=("a", "b"))


def hashes(tenant, scope=CacheScope.TENANT, salt=b"", tenancy=TENANCY):
    return set(block_hashes(root_hash("model", tenancy.cache_key(tenant, scope, salt)), range(64), 16))


def test_the_same_prompt_of_two_tenants_has_no_hash_in_common():
    assert hashes("a") == hashes("a")
    assert hashes("a").isdisjoint(hashes("b"))


def test_tenants_share_what_they_make_public_and_nothing_else():
    assert hashes("a", CacheScope.PUBLIC) == hashes("b", CacheScope.PUBLIC)
    assert hashes("a", CacheScope.PUBLIC).isdisjoint(hashes("a"))


def test_a_salt_separates_within_a_tenant_and_is_no_key_to_another():
    assert hashes("a", salt=b"s") == hashes("a", salt=b"s")
    assert hashes("a", salt=b"s").isdisjoint(hashes("a"))
    assert hashes("a", salt=b"s").isdisjoint(hashes("b", salt=b"s"))


def test_another_cluster_secret_gives_other_hashes():
    assert hashes("a").isdisjoint(hashes("a", tenancy=Tenancy(secret=b"other")))
    assert hashes("a").isdisjoint(hashes("a", tenancy=Tenancy()))


def test_tenant_and_salt_do_not_run_into_each_other():
    assert tenant_key(b"s", "ab", b"c") != tenant_key(b"s", "a", b"bc")


def test_a_tenant_that_may_not_is_refused_the_public_scope():
    with pytest.raises(InvalidRequest, match="cache_scope public is not allowed for tenant c") as caught:
        TENANCY.cache_key("c", CacheScope.PUBLIC, b"")
    assert (caught.value.field, caught.value.limit) == ("cache_scope", "tenant")


def test_every_tenant_may_use_the_public_scope_by_default():
    assert Tenancy().cache_key("anybody", CacheScope.PUBLIC, b"") == b""


def test_a_public_prefix_with_a_salt_is_refused():
    with pytest.raises(InvalidRequest, match="give one of them"):
        TENANCY.cache_key("a", CacheScope.PUBLIC, b"s")


def test_the_rules_do_not_show_the_secret():
    assert "secret" not in repr(TENANCY)


def test_a_request_without_a_tenant_has_the_default_one():
    assert tenant_of([]) == DEFAULT_TENANT


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "x" * 64])
def test_a_tenant_is_called_as_the_header_says(name):
    assert tenant_of([name]) == name


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "*", "ä", "a\n"])
def test_a_name_that_no_tenant_has_is_refused(name):
    with pytest.raises(InvalidRequest, match="x-tenant-id must be 1 to 64 characters") as caught:
        tenant_of([name])
    assert caught.value.field == "x-tenant-id"


def test_a_tenant_given_twice_is_refused():
    with pytest.raises(InvalidRequest, match="x-tenant-id is given 2 times"):
        tenant_of(["a", "a"])
