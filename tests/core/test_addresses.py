"""Names and addresses in settings."""

import re
from pathlib import Path

import pytest

from headrace.core.addresses import check_addresses, check_name
from headrace.errors import ConfigError
from headrace.kvstore.config import KvStoreConfig
from headrace.router.config import RouterConfig
from headrace.worker.config import WorkerConfig, WorkerRole


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "a\x00"])
def test_a_name_is_one_word(name):
    check_name("kvstore-0")
    with pytest.raises(ConfigError, match="name wants a word"):
        check_name(name)


@pytest.mark.parametrize(
    "address",
    ["foo", "foo:", ":1", "foo:x", "foo:0", "foo:65536", "foo:-1", "", "a b:1", "http://x:80", "::1:1", "a\t:1"],
)
def test_an_address_has_a_host_and_a_port(address):
    check_addresses(("127.0.0.1:1", "[::1]:1", "[fe80::1%eth0.100]:1", "store.example:65535"), "siblings")
    with pytest.raises(ConfigError, match="siblings wants host:port.*" + re.escape(f"found {address!r}")):
        check_addresses(("127.0.0.1:1", address), "siblings")


def test_an_address_stands_in_a_list_once():
    with pytest.raises(ConfigError, match="kvstores names 'a:1' twice"):
        check_addresses(("a:1", "b:1", "a:1"), "kvstores")


def worker(**changes):
    return WorkerConfig(**{"name": "w", "role": WorkerRole.DECODE, "model": Path("m"), **changes})


def router(**changes):
    return RouterConfig(model=Path("m"), **changes)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (KvStoreConfig, "siblings"),
        (worker, "kvstores"),
        (worker, "peers"),
        (router, "workers"),
        (router, "kvstores"),
    ],
)
def test_every_service_checks_its_name_and_its_addresses(make, field):
    make(**{field: ("a:1", "b:1")})
    with pytest.raises(ConfigError, match="name wants a word"):
        make(name="")
    for bad in (("foo",), ("a:1", "a:1")):
        with pytest.raises(ConfigError, match=f"^{field} "):
            make(**{field: bad})


def test_a_store_is_not_among_its_siblings():
    with pytest.raises(ConfigError, match="siblings names this store itself, 127.0.0.1:7"):
        KvStoreConfig(grpc_port=7, siblings=("127.0.0.1:6", "127.0.0.1:7"))
