from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.block import BlockHash
from headrace.core.cost import CostModel
from headrace.core.eviction import BlockFacts, ByValue, LeastRecentlyUsed, S3Fifo
from headrace.core.ledger import BlockLedger

COST = CostModel(step_s=1.0, prompt_s=1.0, token_s=1e-3, pair_s=1e-6, decode_s=0.0, context_s=0.0)
ORDERS = {
    "lru": lambda num_blocks: LeastRecentlyUsed(),
    "s3-fifo": S3Fifo,
    "value": lambda num_blocks: ByValue(COST, block_tokens=16, num_blocks=num_blocks),
}
every_order = pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS.keys())


def name_of(text):
    return BlockHash(text.encode().ljust(16, b"\0"))


def chain_of(path):
    """Return the names of the prompt whose blocks are the letters of `path`, and what is known of them."""
    names = [name_of(path[: end + 1]) for end in range(len(path))]
    facts = [
        BlockFacts(parent=names[index - 1] if index else None, num_tokens_before=16 * index)
        for index in range(len(names))
    ]
    return names, facts


def put(ledger, path, tenant=""):
    """Use what is there of a prompt, store the rest, as one request; return the names forgotten for it."""
    names, facts = chain_of(path)
    shared = ledger.match(names)
    granted = ledger.lease(path, len(names) - len(shared), shared=shared)
    for block, name, fact in list(zip(granted, names, facts, strict=True))[len(shared) :]:
        ledger.name(
            block, name, BlockFacts(parent=fact.parent, num_tokens_before=fact.num_tokens_before, tenant=tenant)
        )
    ledger.release(path)
    return [name.rstrip(b"\0").decode() for name in ledger.take_evicted()]


def ledger_with(make, num_blocks, *paths):
    ledger = BlockLedger(num_blocks, make(num_blocks))
    for path in paths:
        put(ledger, path)
    return ledger


@every_order
@given(paths=st.lists(st.text("ab", min_size=1, max_size=7), min_size=1, max_size=40), room=st.integers(7, 20))
@settings(max_examples=60, deadline=None)
def test_no_block_stays_that_its_chain_does_not_lead_to(make, paths, room):
    ledger = ledger_with(make, room)
    for path in paths:
        put(ledger, path)
        stored = {name.rstrip(b"\0").decode() for name in ledger.names()}
        assert all(name[:-1] in stored for name in stored if len(name) > 1)
        ledger.verify()


@every_order
def test_what_rests_is_evicted_even_where_only_its_ends_are_in_use(make):
    order = make(4)
    names, facts = chain_of("abc")
    for name, fact in zip(names, facts, strict=True):
        order.add(name, fact)
    order.rest(names[0])
    assert order.evict("") is None
    assert order.evict() == names[0]
    assert order.evict() is None


@every_order
def test_a_tenant_gives_up_its_own_blocks_only(make):
    ledger = BlockLedger(6, make(6))
    put(ledger, "ab", tenant="red")
    put(ledger, "xyz", tenant="blue")
    assert [ledger.forget_of("blue") for _ in range(4)] == [True, True, True, False]
    assert ledger.take_evicted() == (name_of("xyz"), name_of("xy"), name_of("x"))
    assert ledger.forget_of("nobody") is False
    assert set(ledger.names()) == {name_of("a"), name_of("ab")}
    ledger.verify()


@every_order
def test_a_tenant_keeps_what_another_one_builds_on(make):
    ledger = BlockLedger(6, make(6))
    put(ledger, "ab", tenant="red")
    put(ledger, "abc", tenant="blue")
    assert not ledger.forget_of("red")
    assert ledger.forget_of("blue")
    assert ledger.forget_of("red")


@every_order
def test_a_block_taken_away_is_not_evicted_any_more(make):
    ledger = ledger_with(make, 4, "ab", "x")
    ledger.unname(name_of("ab"))
    ledger.forget_cached()
    assert set(ledger.take_evicted()) == {name_of("a"), name_of("ab"), name_of("x")}
    ledger.verify()


@given(st.lists(st.tuples(st.sampled_from("use drop evict".split()), st.integers(0, 9)), max_size=60))
def test_least_recently_used_is_an_ordered_dict(steps):
    order, model = LeastRecentlyUsed(), OrderedDict()
    for what, number in steps:
        name = name_of(str(number))
        if what == "evict":
            assert order.evict() == (model.popitem(last=False)[0] if model else None)
        elif what == "drop" and name in model:
            order.drop(name)
            del model[name]
        elif what == "use":
            order.use(name) if name in model else order.add(name, BlockFacts())
            order.rest(name)
            model[name] = None
            model.move_to_end(name)


def test_s3_fifo_keeps_what_was_used_twice_through_a_scan():
    ledger = ledger_with(S3Fifo, 10, "a", "a", *"bcdefghijklmnopqrstuvwxyz")
    assert ledger.lookup(name_of("a")) is not None
    assert ledger_with(ORDERS["lru"], 10, "a", "a", *"bcdefghijklmnopqrstuvwxyz").lookup(name_of("a")) is None


def test_s3_fifo_takes_what_comes_back_soon_for_used():
    ledger = ledger_with(S3Fifo, 10, *"abcdefghijk")
    assert ledger.lookup(name_of("a")) is None
    for path in "almnopqrstuv":
        put(ledger, path)
    assert ledger.lookup(name_of("a")) is not None


def test_of_blocks_used_alike_the_one_dear_to_recompute_stays():
    order = ORDERS["value"](8)
    for name, before in (("dear", 4000), ("cheap", 0)):
        order.add(name_of(name), BlockFacts(num_tokens_before=before))
        order.rest(name_of(name))
    assert order.evict() == name_of("cheap")


def test_of_blocks_that_cost_alike_the_one_used_more_often_stays():
    ledger = ledger_with(ORDERS["value"], 12, *"aaabcdefghijkl")
    assert put(ledger, "m") == ["b"]


@pytest.mark.parametrize("num_blocks", [16, 256])
def test_what_was_worth_most_once_does_not_fill_a_store_for_good(num_blocks):
    ledger = BlockLedger(num_blocks, ORDERS["value"](num_blocks))
    long_ago = "".join(chr(0x100 + place) for place in range(num_blocks // 2))
    put(ledger, long_ago)
    for number in range(2 * num_blocks):
        put(ledger, chr(0x1000 + number))
    assert ledger.match(chain_of(long_ago)[0][:1]) == ()


def test_value_fades_with_what_came_since():
    ledger = ledger_with(ORDERS["value"], 3, "a", "a")
    assert "a" in [name for path in "bcdefghijkl" for name in put(ledger, path)]


def test_a_conversation_inherits_the_uses_of_its_earlier_turns():
    ledger = ledger_with(ORDERS["value"], 20, "a", "ab", "abc", "x", "xy")
    forgotten = [name for letter in "0123456789defghijklmnopqrstuvw" for name in put(ledger, letter)]
    assert forgotten.index("xy") < forgotten.index("abc")


def test_a_cost_model_that_says_nothing_orders_by_use():
    free = CostModel(step_s=1.0, prompt_s=0.0, token_s=0.0, pair_s=0.0, decode_s=0.0, context_s=0.0)
    ledger = ledger_with(lambda room: ByValue(free, block_tokens=16, num_blocks=room), 2, "a", "b")
    assert put(ledger, "c") == ["a"]


@every_order
def test_memory_is_bounded_however_often_blocks_are_used_and_whoever_owned_them(make):
    def num_held(order):
        parts = [value for value in vars(order).values() if hasattr(value, "__len__")]
        return sum(len(part) for part in parts) + sum(len(heap) for heap in getattr(order, "_heaps", {}).values())

    order = make(6)
    ledger = BlockLedger(6, order)
    for number in range(5000):
        put(ledger, "abc"[: number % 3 + 1])
        put(ledger, "xy", tenant=f"tenant-{number}")
        ledger.forget_of(f"tenant-{number}")
        ledger.forget_of(f"tenant-{number}")
    ledger.verify()
    assert num_held(order) < 200
