"""Hashes of blocks and keys of tenants, against docs/block-hash.md put into code once more."""

import hashlib
import json
from pathlib import Path

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.block import block_hashes, chain_hash, root_hash
from headrace.core.tenancy import tenant_key

VECTORS = json.loads(Path(__file__).with_name("block_hash_vectors.json").read_text(encoding="utf-8"))
ROOT = root_hash("model")


def u32(number):
    return bytes([number & 255, number >> 8 & 255, number >> 16 & 255, number >> 24])


def part(content):
    return u32(len(content)) + content


def hash16(content):
    return blake3.blake3(content).digest()[:16]


def hmac_sha256(key, message):
    """HMAC as RFC 2104 writes it; keys here are no longer than a block of SHA-256."""
    key = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in key) + inner).digest()


def documented_key(secret, tenant, salt):
    return hmac_sha256(secret, b"headrace-tenant-2\0" + part(tenant.encode("utf-8")) + part(salt))


def documented_root(fingerprint, key):
    return hash16(b"headrace-root-2\0" + part(fingerprint.encode("utf-8")) + part(key))


def documented_hashes(parent, tokens, block_tokens, extras):
    hashes = []
    while len(tokens) >= block_tokens:
        block, tokens = tokens[:block_tokens], tokens[block_tokens:]
        message = parent + u32(block_tokens)
        for token in block:
            message += u32(token)
        for extra in extras.get(len(hashes), ()):
            message += part(extra)
        parent = hash16(message)
        hashes.append(parent)
    return tuple(hashes)


@pytest.mark.parametrize("compute", [tenant_key, documented_key])
@pytest.mark.parametrize("vector", VECTORS["tenant_keys"])
def test_keys_of_tenants_are_those_of_the_vectors(compute, vector):
    secret, salt = bytes.fromhex(vector["cluster_secret"]), bytes.fromhex(vector["cache_salt"])
    assert compute(secret, vector["tenant"], salt).hex() == vector["cache_key"]


@pytest.mark.parametrize("compute", [root_hash, documented_root])
@pytest.mark.parametrize("vector", VECTORS["roots"])
def test_roots_are_those_of_the_vectors(compute, vector):
    assert compute(vector["model_fingerprint"], bytes.fromhex(vector["cache_key"])).hex() == vector["root"]


@pytest.mark.parametrize("compute", [block_hashes, documented_hashes])
@pytest.mark.parametrize("vector", VECTORS["chains"])
def test_hashes_are_those_of_the_vectors(compute, vector):
    extras = {int(index): [bytes.fromhex(extra) for extra in each] for index, each in vector["extras"].items()}
    hashes = compute(bytes.fromhex(vector["parent"]), vector["tokens"], vector["block_tokens"], extras)
    assert [each.hex() for each in hashes] == vector["hashes"]


TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
EXTRAS = st.dictionaries(st.integers(0, 9), st.lists(st.binary(max_size=5), max_size=3), max_size=4)


@given(TOKENS, st.integers(1, 9), EXTRAS)
def test_hashes_of_anything_are_those_that_the_document_states(tokens, block_tokens, extras):
    assert block_hashes(ROOT, tokens, block_tokens, extras) == documented_hashes(ROOT, tokens, block_tokens, extras)


@given(TOKENS, st.integers(1, 9), st.integers(0, 9))
def test_a_chain_may_be_hashed_in_parts(tokens, block_tokens, num_first):
    whole = block_hashes(ROOT, tokens, block_tokens)
    first = block_hashes(ROOT, tokens[: num_first * block_tokens], block_tokens)
    rest = block_hashes(first[-1] if first else ROOT, tokens[num_first * block_tokens :], block_tokens)
    assert first + rest == whole


def test_one_block_hashes_as_it_does_in_its_chain():
    first = chain_hash(ROOT, [1, 2], [b"image"])
    assert (first, chain_hash(first, (3, 4))) == block_hashes(ROOT, range(1, 5), 2, {0: [b"image"]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (([1, 2], [b"ab", b""]), ([1, 2], [b"a", b"b"])),
        (([1, 2], [b"a", b"b"]), ([1, 2], [b"b", b"a"])),
        (([1, 2], [b""]), ([1, 2], [])),
        (([1, 2, 0], []), ([1, 2], [b""])),
        (([1, 2], []), ([2, 1], [])),
    ],
)
def test_blocks_that_differ_in_tokens_or_extras_have_other_hashes(one, other):
    assert chain_hash(ROOT, *one) != chain_hash(ROOT, *other)


def test_an_extra_changes_its_block_and_all_later_ones():
    plain, marked = (block_hashes(ROOT, range(8), 2, extras) for extras in ({}, {1: [b"image"]}))
    assert [one == other for one, other in zip(plain, marked, strict=True)] == [True, False, False, False]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_does_not_fit_is_an_error(token):
    with pytest.raises(OverflowError):
        chain_hash(ROOT, [token])


def test_the_machines_order_of_bytes_does_not_matter(monkeypatch):
    little = chain_hash(ROOT, [1])
    monkeypatch.setattr("headrace.core.block.sys.byteorder", "big")
    # A little-endian machine that takes itself for a big-endian one writes the bytes of 2^24 in reverse order.
    assert chain_hash(ROOT, [2**24]) == little
