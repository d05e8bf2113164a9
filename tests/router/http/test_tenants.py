"""Whose cached prefixes a request may use, over HTTP."""

import pytest

from headrace.core.tenancy import tenant_key

BODIES = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/completions", {"prompt": "ab"}),
]
MALFORMED = ["", "a b", "x" * 65, "a/b"]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_the_header_names_the_tenant(http, frontend, path, body):
    response = await http.post(path, json=body, headers={"X-Tenant-Id": "team-a"})
    assert response.status_code == 200
    (request,) = frontend.requests
    assert (request.tenant, request.cache_key) == ("team-a", tenant_key(b"secret", "team-a", b""))


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_tenant_that_may_makes_its_prefix_public(http, frontend, path, body):
    await http.post(path, json={**body, "cache_scope": "public"}, headers={"X-Tenant-Id": "open"})
    (request,) = frontend.requests
    assert (request.tenant, request.cache_key) == ("open", b"")


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_tenant_that_may_not_make_its_prefix_public_is_told_so(http, frontend, path, body):
    response = await http.post(path, json={**body, "cache_scope": "public"}, headers={"X-Tenant-Id": "closed"})
    error = response.json()["error"]
    assert (response.status_code, error["param"], frontend.requests) == (400, "cache_scope", [])
    assert "not allowed for tenant closed" in error["message"]


async def test_an_unknown_scope_is_refused(http):
    response = await http.post(BODIES[0][0], json={**BODIES[0][1], "cache_scope": "mine"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_scope")


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_header_that_names_no_tenant_is_refused(http, frontend, name):
    response = await http.post(BODIES[0][0], json=BODIES[0][1], headers={"X-Tenant-Id": name})
    assert (response.status_code, response.json()["error"]["param"], frontend.requests) == (400, "x-tenant-id", [])


async def test_a_header_that_a_proxy_added_to_the_clients_is_refused(http, frontend):
    headers = [("X-Tenant-Id", "mine"), ("X-Tenant-Id", "theirs")]
    response = await http.post(BODIES[0][0], json=BODIES[0][1], headers=headers)
    assert (response.status_code, frontend.requests) == (400, [])
