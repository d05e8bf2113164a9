"""What the engine does with blocks: reuse, pins, writers, preemption."""

import pytest

from headrace.core.block import BlockId
from headrace.core.request import SequenceId
from headrace.engine.messages import (
    Admitted,
    Begin,
    Close,
    Goal,
    HoldWriter,
    Keep,
    ListHolders,
    Pin,
    Quarantine,
    ReleaseWriter,
    Unpin,
)
from headrace.errors import DeadlineExceeded

BLOCK = 4


def test_blocks_that_peers_were_told_of_stay_until_close(make_client, prompt_of):
    client = make_client(num_blocks=4)
    held = client.open(prompt_of(1, 12), begins=False, life_s=10.0)
    client.steps()
    blocks = client.admitted(held).block_ids
    client.clock.advance(11.0)
    client.steps()
    assert isinstance(client.error(held), DeadlineExceeded)
    # A writer that was announced before anyone heard of the deadline still finds its blocks untouched.
    client.engine.apply(HoldWriter(writer_id="late", block_ids=blocks))
    client.close(held)
    waiting = client.open(prompt_of(2, 12))
    client.steps()
    assert not client.events[waiting]
    client.engine.apply(ReleaseWriter(writer_id="late"))
    client.steps()
    assert client.tokens(waiting)
    client.at_rest()


def test_a_second_answer_reuses_the_prefix(make_client, prompt_of):
    client = make_client()
    prompt = prompt_of(1, 22)
    first = client.run(prompt)
    before = client.stats().computed_tokens
    again = client.open(prompt)
    client.steps()
    assert client.tokens(again) == first
    assert client.admitted(again).num_cached_tokens == 20
    assert client.stats().computed_tokens - before == 2 + 7


def test_the_last_known_token_is_always_computed(make_client, prompt_of):
    client, prompt = make_client(), prompt_of(1, 16)
    client.run(prompt)
    again = client.open(prompt)
    client.steps()
    assert client.admitted(again).num_cached_tokens == 12


def test_an_answer_is_a_prefix_for_the_next_turn(make_client, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    answer = client.run(prompt, max_tokens=9, ignore_eos=True)
    turn = client.open((*prompt, *answer, 5, 6, 7))
    client.steps()
    # The KV of an answer's last token is never computed: 18 of 19 tokens, in full blocks.
    assert client.admitted(turn).num_cached_tokens == 16


def test_tenants_do_not_share(make_client, prompt_of):
    client, prompt = make_client(), prompt_of(1, 16)
    client.run(prompt, salt=b"a")
    other = client.open(prompt, salt=b"b")
    client.steps()
    assert client.admitted(other).num_cached_tokens == 0


def test_changes_of_the_cache_are_told_with_what_is_true(make_client, prompt_of):
    client = make_client(num_blocks=8)
    for seed in range(6):
        client.run(prompt_of(seed, 18), max_tokens=2, ignore_eos=True)
    known = set()
    for change in client.changes:
        assert not known & set(change.stored)
        assert set(change.removed) <= known
        known = (known | set(change.stored)) - set(change.removed)
    assert known == set(client.engine._cache.ledger.names())


def test_pinned_blocks_are_not_reused(make_client, prompt_of):
    client = make_client(num_blocks=6)
    first = client.open(prompt_of(1, 16), max_tokens=1)
    client.steps()
    hashes = client.admitted(first).block_hashes
    assert len(client.pin("p", (*hashes, b"unknown"))) == 4
    assert client.pin("p", hashes) == ()
    waiting = client.open(prompt_of(2, 16), max_tokens=1)
    client.steps()
    assert client.tokens(waiting) == []
    client.engine.apply(Unpin(lease_id="p"))
    client.steps()
    assert len(client.tokens(waiting)) == 1
    client.at_rest()


def test_a_pin_and_a_sequence_of_the_same_name_are_two_things(make_client, reference, prompt_of):
    client = make_client()
    first = client.open(prompt_of(1, 16))
    client.steps()
    hashes = client.admitted(first).block_hashes
    assert client.pin("s1", hashes)
    second = client.open(prompt_of(1, 17), max_tokens=20, ignore_eos=True)
    assert second == "s1"
    client.steps(3)
    client.engine.apply(Unpin(lease_id="s1"))
    client.engine.apply(Unpin(lease_id="s1"))
    client.steps()
    assert client.tokens(second) == reference(prompt_of(1, 17), max_tokens=20, ignore_eos=True)


def test_the_list_of_holders_names_sequences_pins_and_writers(make_client, prompt_of):
    client = make_client()
    first = client.open(prompt_of(1, 8), goal=Goal.FIRST_TOKEN)
    client.steps()
    terms = {"owner": "read", "reader": "p1", "epoch": "e"}
    hashes = client.admitted(first).block_hashes[:1]
    client.engine.apply(Pin(lease_id="l", block_hashes=hashes, deadline_s=1500.0, reply=lambda _: None, **terms))
    client.engine.apply(HoldWriter(writer_id="w", block_ids=client.admitted(first).block_ids))
    found = []
    client.engine.apply(ListHolders(reply=found.extend))
    assert [(each.owner, each.reader, each.epoch, each.deadline_s, each.num_blocks) for each in found] == [
        (first, "", "", float("inf"), 2),
        ("read", "p1", "e", 1500.0, 1),
        ("", "", "", None, 2),
    ]
    client.engine.apply(Unpin(lease_id="l"))
    client.engine.apply(ReleaseWriter(writer_id="w"))


def test_a_quarantined_block_is_computed_anew_and_the_index_hears_of_it(make_client, reference, prompt_of):
    client = make_client()
    first = client.open(prompt_of(1, 16))
    client.steps()
    hashes, blocks = client.admitted(first).block_hashes, client.admitted(first).block_ids
    client.runner.write(blocks[1:2], (1,) * 4)
    client.engine.apply(Quarantine(block_hash=hashes[1], reply=lambda _: None))
    client.steps()
    assert client.changes[-1].removed == (hashes[1],)
    second = client.open(prompt_of(1, 16))
    client.steps()
    assert client.admitted(second).num_cached_tokens == 4
    assert client.tokens(second) == reference(prompt_of(1, 16))


def test_a_pin_ends_by_the_clock(make_client, prompt_of):
    client = make_client()
    first = client.open(prompt_of(1, 16))
    client.steps()
    client.pin("p", client.admitted(first).block_hashes, deadline_s=1005.0)
    assert client.engine.next_deadline_s() == 1005.0
    client.clock.advance(6.0)
    client.steps()
    client.at_rest()


def test_a_writer_on_blocks_nobody_holds_is_refused_and_logged(make_client, caplog):
    client = make_client()
    client.engine.apply(HoldWriter(writer_id="w", block_ids=(BlockId(0),)))
    assert "command refused" in caplog.messages
    client.at_rest()


def test_unknown_ids_are_ignored(make_client):
    client = make_client()
    for command in (
        Close(sequence_id=SequenceId("x")),
        Begin(sequence_id=SequenceId("x"), num_present=0),
        Unpin(lease_id="x"),
        ReleaseWriter(writer_id="x"),
    ):
        client.engine.apply(command)
    client.at_rest()


def test_a_preempted_sequence_goes_on_where_it_was(make_client, reference, prompt_of):
    client = make_client(num_blocks=12, max_running=4)
    sequences = [client.open(prompt_of(seed, 12), max_tokens=14, ignore_eos=True) for seed in range(3)]
    client.steps()
    assert client.stats().num_preemptions > 0
    for seed, sequence in enumerate(sequences):
        assert client.tokens(sequence) == reference(prompt_of(seed, 12), max_tokens=14, ignore_eos=True)
        assert sum(isinstance(event, Admitted) for event in client.events[sequence]) == 1
    client.at_rest()


def test_what_a_peer_may_still_read_is_never_preempted(make_client, reference, prompt_of):
    client = make_client(num_blocks=8)
    prefilled = client.open(prompt_of(1, 16), goal=Goal.FIRST_TOKEN)
    client.steps()
    answer = client.open(prompt_of(2, 12), max_tokens=20, ignore_eos=True)
    client.steps()
    # Four blocks are left for the answer: it waits rather than take those of the prefilled prompt.
    assert len(client.tokens(answer)) < 20
    client.close(prefilled)
    client.steps()
    assert client.tokens(answer) == reference(prompt_of(2, 12), max_tokens=20, ignore_eos=True)


def test_computed_prompts_that_wait_for_their_hand_over_count_against_the_places(make_client, prompt_of):
    client = make_client(num_blocks=64, max_running=3)
    prefilled = [client.open(prompt_of(seed, 6), goal=Goal.FIRST_TOKEN) for seed in range(5)]
    client.steps()
    assert [len(client.sampled(each)) for each in prefilled] == [1, 1, 1, 0, 0]
    assert client.stats().num_running == 3
    assert client.stats().leased_blocks == 6
    client.close(prefilled[0])
    client.steps()
    assert [len(client.sampled(each)) for each in prefilled] == [1, 1, 1, 1, 0]


def test_a_failed_sequence_that_keeps_its_blocks_keeps_its_place(make_client, prompt_of):
    client = make_client(max_running=1)
    late = client.open(prompt_of(1, 6), begins=False, life_s=1.0)
    client.steps()
    client.clock.advance(2.0)
    following = client.open(prompt_of(2, 6))
    client.steps()
    assert client.error(late) is not None
    assert client.events[following] == []
    client.close(late)
    client.steps()
    assert client.finish(following) is not None


def test_a_prompt_whose_kv_is_pushed_while_it_runs_is_never_preempted(make_client, prompt_of, reference):
    client = make_client(num_blocks=12, budget=2)
    answer = client.open(prompt_of(1, 7), max_tokens=12, ignore_eos=True)
    client.steps(6)
    prefilled = client.open(prompt_of(2, 36), goal=Goal.FIRST_TOKEN)
    client.steps(12)
    assert client.stats().num_preemptions == 1
    client.steps()
    assert client.progress(prefilled) == sorted(client.progress(prefilled))
    client.close(prefilled)
    client.steps()
    assert client.tokens(answer) == reference(prompt_of(1, 7), max_tokens=12, ignore_eos=True)


def test_no_more_is_preempted_than_is_needed(make_client, prompt_of):
    client = make_client(num_blocks=12)
    for seed in range(4):
        client.open(prompt_of(seed, 11), max_tokens=9, ignore_eos=True)
    while not client.stats().num_preemptions:
        client.steps(1)
    assert client.stats().num_preemptions == 1
    assert client.stats().num_running == 3


def test_a_growing_sequence_does_not_take_a_prefix_that_an_admission_counts_on(make_client, reference, prompt_of):
    client = make_client(num_blocks=7)
    prompt = prompt_of(1, 13)
    # The first block is there twice: the short one did not wait for what a peer was to send. Its own has the name
    # and stays cached, oldest of all, while the next ones are in use: without the first nobody can find them.
    growing = client.open(prompt, max_tokens=12, ignore_eos=True, arrives_whole=True, begins=False)
    client.run(prompt[:5], max_tokens=1, ignore_eos=True)
    client.run(prompt_of(2, 8), max_tokens=1, ignore_eos=True)
    client.begin(growing, 0)
    client.steps(4)
    stats = client.stats()
    assert (stats.free_blocks, stats.cached_blocks, client.engine._sequences[growing].kv_length) == (0, 3, 16)
    joining = client.open(prompt, max_tokens=2, ignore_eos=True)
    client.steps(1)
    assert client.admitted(joining).num_cached_tokens == 12
    client.steps()
    assert client.tokens(joining) == client.tokens(growing)[:2] == reference(prompt, max_tokens=2, ignore_eos=True)


@pytest.mark.parametrize("budget", [3, 16, 512])
def test_a_prefix_that_is_being_computed_is_shared_with_who_arrives_meanwhile(
    make_client, prompt_of, reference, budget
):
    client = make_client(num_blocks=256, budget=budget, max_running=32)
    prefix = prompt_of(1, 32)
    prompts = [[*prefix, *prompt_of(seed, 5)] for seed in range(2, 10)]
    opened = [client.open(prompts[0], max_tokens=3, ignore_eos=True)]
    client.steps(3)
    opened += [client.open(prompt, max_tokens=3, ignore_eos=True) for prompt in prompts[1:]]
    client.steps()
    for prompt, sequence in zip(prompts, opened, strict=True):
        assert client.tokens(sequence) == reference(prompt, max_tokens=3, ignore_eos=True)
    assert client.stats().computed_tokens == len(prefix) + len(prompts) * (5 + 2)
    client.end()


def test_who_waits_for_a_prefix_goes_on_when_it_is_not_computed_after_all(make_client, prompt_of, reference):
    client = make_client(num_blocks=64, budget=4)
    prompt = prompt_of(1, 32)
    leader = client.open([*prompt, 3, 5], max_tokens=3)
    client.steps(4)
    follower = client.open([*prompt, 7], max_tokens=3, ignore_eos=True)
    client.steps(2)
    assert not client.events[follower]
    client.close(leader)
    client.steps()
    assert client.tokens(follower) == reference([*prompt, 7], max_tokens=3, ignore_eos=True)
    client.end()


@pytest.mark.parametrize(("num_shared", "waits"), [(16, True), (12, False)])
def test_what_a_peer_sends_is_waited_for_if_half_of_it_is_shared(make_client, prompt_of, num_shared, waits):
    client = make_client(num_blocks=64)
    prompt = prompt_of(1, 33)
    client.open(prompt, arrives_whole=True, begins=False)
    follower = client.open([*prompt[:num_shared], *prompt_of(2, 9)], arrives_whole=True, begins=False)
    client.steps()
    assert (not client.events[follower]) == waits


@pytest.mark.parametrize("is_open", [False, True], ids=["whole", "in revisions"])
def test_who_computes_a_prompt_does_not_wait_for_the_peer_that_may_wait_for_it(
    make_client, reference, prompt_of, is_open
):
    """As when a prefill worker has to be the decode worker of a context too: what lands there comes from itself."""
    client, prompt = make_client(num_blocks=64), prompt_of(1, 33)
    client.open(prompt, arrives_whole=True, begins=False)
    client.steps()
    own = client.open(prompt, is_open=is_open, max_tokens=1, ignore_eos=True)
    if is_open:
        client.revise(own, closed=True)
    client.steps()
    assert client.tokens(own) == reference(prompt, max_tokens=1, ignore_eos=True)


def test_n_answers_to_a_prompt_compute_it_once(make_client, prompt_of):
    client = make_client(num_blocks=64)
    prompt = prompt_of(1, 33)
    for choice in range(4):
        client.open(prompt, choice=choice, temperature=1.0, seed=7, max_tokens=2, ignore_eos=True)
    client.steps()
    assert client.stats().computed_tokens == 32 + 4 * 2
    client.end()


def test_kv_that_landed_for_a_sequence_that_cannot_go_on_is_found_by_the_next(make_client, prompt_of):
    client, prompt = make_client(), prompt_of(1, 4 * BLOCK + 1)
    lost = client.open(prompt, begins=False)
    client.steps()
    client.engine.apply(Keep(sequence_id=lost, num_present=2 * BLOCK))
    client.close(lost)
    client.steps()
    assert client.stats().cached_blocks == 2
    again = client.open(prompt, begins=False)
    client.steps()
    assert client.admitted(again).num_cached_tokens == 2 * BLOCK
    client.engine.apply(Keep(sequence_id=SequenceId("unknown"), num_present=BLOCK))
    client.end()
