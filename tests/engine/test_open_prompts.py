"""Prompts that arrive in pieces, or are replaced, while the engine works on them."""

import random

import pytest

from headrace.core.cost import CostModel
from headrace.core.request import Revision
from headrace.engine.messages import Goal, Progress, Quarantine, Revise, Unpin
from headrace.engine.scheduler import RECOMPUTE_ALWAYS, FirstComeFirstServed
from headrace.errors import InternalError, InvalidRequest
from headrace.techniques.stream2llm.order import make_order
from headrace.techniques.stream2llm.preempt import PreemptByCost, SwapAlways

BLOCK = 4
FCFS = make_order("fcfs")
COST = CostModel(step_s=1e-4, prompt_s=0.0, token_s=1e-5, pair_s=1e-8, decode_s=1e-5, context_s=0.0)


def computed(client):
    """Return how many tokens each step computed."""
    return [batch.num_tokens for batch in client.runner.batches]


def test_what_is_known_is_computed_while_the_rest_arrives(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 30)
    answer = client.open(prompt[:10], is_open=True)
    client.steps()
    assert computed(client) == [9]
    client.revise(answer, prompt[10:28])
    client.steps()
    assert computed(client) == [9, 18]
    client.revise(answer, prompt[28:], closed=True)
    client.steps()
    assert computed(client)[2] == 3
    assert client.tokens(answer) == reference(prompt)


def test_no_token_comes_from_an_open_prompt(make_client, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 10), is_open=True)
    for size in (1, 3, 7):
        client.steps()
        client.revise(answer, prompt_of(size, size))
    client.steps()
    assert client.tokens(answer) == []
    assert not any(item.sample for batch in client.runner.batches for item in batch.items)


def test_a_close_that_adds_nothing_computes_one_token(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    answer = client.open(prompt, is_open=True, max_tokens=1)
    client.steps()
    client.revise(answer, closed=True)
    client.steps()
    assert computed(client) == [9, 1]
    assert client.tokens(answer) == reference(prompt, max_tokens=1)


def test_a_prompt_may_begin_with_nothing(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 10)
    answer = client.open((), is_open=True)
    client.steps()
    assert computed(client) == []
    client.revise(answer, prompt, closed=True)
    client.steps()
    assert client.tokens(answer) == reference(prompt)


@pytest.mark.parametrize("keep", [0, 1, 4, 9, 12, 19])
@pytest.mark.parametrize("added", [0, 1, 5, 20])
@pytest.mark.parametrize("is_final", [False, True], ids=["private", "shared"])
def test_an_update_keeps_the_common_prefix(make_client, reference, prompt_of, keep, added, is_final):
    client = make_client()
    answer = client.open((), is_open=True)
    client.revise(answer, prompt_of(1, 20), is_final=is_final)
    client.steps()
    before = sum(computed(client))
    client.revise(answer, prompt_of(2, added), keep=keep)
    client.steps()
    # There is always a token left to compute at the close; a block that others may share goes as a whole.
    num_open = max(0, keep + added - 1)
    kept = min(keep, num_open)
    kept -= kept % BLOCK if is_final and kept < 16 else 0
    assert sum(computed(client)) - before == num_open - kept
    client.revise(answer, prompt_of(3, 2), closed=True)
    client.steps()
    prompt = (*prompt_of(1, 20)[:keep], *prompt_of(2, added), *prompt_of(3, 2))
    assert client.prompts[answer] == prompt
    assert client.tokens(answer) == reference(prompt)


def test_an_update_gives_blocks_back(make_client, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 41), is_open=True)
    client.steps()
    assert client.stats().leased_blocks == 11
    client.revise(answer, keep=5)
    client.steps()
    assert client.stats().leased_blocks == 1
    client.close(answer)


def test_blocks_are_found_by_others_once_they_cannot_change(make_client, prompt_of):
    client, prompt = make_client(), prompt_of(1, 21)
    private = client.open(prompt, is_open=True)
    client.steps()
    assert not any(change.stored for change in client.changes)
    client.revise(private, is_final=True)
    client.steps()
    assert [len(change.stored) for change in client.changes] == [5]
    client.revise(private, prompt_of(2, 4), keep=20, closed=True)
    client.steps()
    assert client.stats().cached_blocks == 5 + 2  # The answer's eight tokens fill two more.


def test_an_update_that_reaches_into_a_shared_block_leaves_it_to_others(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 20)
    first = client.open(prompt, is_open=True, num_final=20)
    client.steps()
    other = client.open((*prompt, 7), max_tokens=30, ignore_eos=True)
    client.steps(3)
    client.revise(first, prompt_of(2, 9), keep=6, closed=True)
    client.steps()
    assert client.tokens(other) == reference((*prompt, 7), max_tokens=30, ignore_eos=True)
    assert client.tokens(first) == reference((*prompt[:6], *prompt_of(2, 9)))


def test_a_prompt_grows_by_what_others_have_computed(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 41)
    client.run(prompt)
    before = sum(computed(client))
    answer = client.open(prompt[:6], is_open=True)
    client.steps()
    client.revise(answer, prompt[6:])
    client.steps()
    assert sum(computed(client)) - before == 1  # The first two blocks: one whole, and one token of the second.
    client.revise(answer, closed=True)
    client.steps()
    assert client.tokens(answer) == reference(prompt)


def test_progress_names_the_version_and_the_blocks_of_what_is_computed(make_client, prompt_of):
    client = make_client(budget=8)
    sequence = client.open(prompt_of(1, 12), is_open=True, goal=Goal.FIRST_TOKEN)
    client.steps()
    client.revise(sequence, prompt_of(2, 4), keep=6)
    client.steps()
    events = [event for event in client.events[sequence] if isinstance(event, Progress)]
    assert [(each.version, each.num_computed, len(each.block_ids)) for each in events] == [
        (0, 8, 2),
        (0, 11, 3),
        (1, 9, 3),
    ]


@pytest.mark.parametrize(
    ("revision", "error"),
    [
        ({"version": 2}, InternalError),
        ({"num_kept": 11}, InternalError),
        ({"tokens": (64,)}, InvalidRequest),
        ({"tokens": (3,) * 246}, InvalidRequest),
        ({"num_kept": 0, "is_closed": True}, InvalidRequest),
    ],
    ids=["gap", "keeps too much", "not in the vocabulary", "too long", "closed empty"],
)
def test_a_revision_that_makes_no_sense_fails_its_sequence_alone(make_client, reference, prompt_of, revision, error):
    client = make_client()
    other = client.open(prompt_of(3, 9))
    answer = client.open(prompt_of(1, 10), is_open=True)
    client.steps(2)
    fields = {"version": 1, "num_kept": 10, "tokens": (), **revision}
    client.engine.apply(Revise(sequence_id=answer, revision=Revision(**fields)))
    client.steps()
    assert isinstance(client.error(answer), error)
    assert client.tokens(other) == reference(prompt_of(3, 9))


def test_nothing_may_follow_the_close(make_client, prompt_of):
    client = make_client()
    answer = client.open(prompt_of(1, 10), is_open=True, max_tokens=20, ignore_eos=True)
    client.revise(answer, closed=True)
    client.steps(4)
    client.revise(answer, (5,))
    client.steps()
    assert isinstance(client.error(answer), InternalError)


def test_a_revision_waits_until_nothing_is_fetched_into_the_blocks(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 20)
    answer = client.open(prompt, is_open=True, begins=False)
    client.steps()
    client.revise(answer, prompt_of(2, 5), keep=6, closed=True)
    client.steps()
    assert computed(client) == []
    client.runner.write(client.admitted(answer).block_ids, prompt[:16])
    client.begin(answer, 16)
    client.steps()
    assert client.tokens(answer) == reference((*prompt[:6], *prompt_of(2, 5)))
    assert computed(client)[0] == 5


# -- Room ---------------------------------------------------------------------


def fill(client, prompt_of, num_tokens, seed=1, *, is_stalled=True, **options):
    """Open a prompt that is computed and of which nothing more is heard."""
    sequence = client.open(prompt_of(seed, num_tokens), is_open=True, **options)
    client.steps()
    client.clock.advance(2.0 if is_stalled else 0.0)
    return sequence


@pytest.mark.parametrize("preempt", [RECOMPUTE_ALWAYS, SwapAlways()], ids=["recompute", "swap"])
def test_a_closed_prompt_takes_the_blocks_of_an_open_one(make_client, reference, prompt_of, preempt):
    client = make_client(num_blocks=12, order=FCFS, preempt=preempt, num_swap_blocks=12)
    stream = fill(client, prompt_of, 31)
    assert client.run(prompt_of(2, 30)) == reference(prompt_of(2, 30))
    before = sum(computed(client))
    client.revise(stream, prompt_of(3, 2), closed=True)
    client.steps()
    assert client.tokens(stream) == reference((*prompt_of(1, 31), *prompt_of(3, 2)))
    again = sum(computed(client)) - before - len(client.tokens(stream)) + 1
    assert again == (33 if preempt is RECOMPUTE_ALWAYS else 3)


def test_by_arrival_alone_an_earlier_open_prompt_keeps_its_blocks(make_client, prompt_of):
    client = make_client(num_blocks=12, order=FirstComeFirstServed())
    fill(client, prompt_of, 41)
    later = client.open(prompt_of(2, 30))
    client.steps()
    assert client.tokens(later) == []


def test_an_open_prompt_that_has_stalled_makes_room_for_one_that_has_not(make_client, prompt_of):
    client = make_client(num_blocks=12, order=FCFS)
    fill(client, prompt_of, 41, is_stalled=False)
    later = client.open(prompt_of(2, 30), is_open=True)
    client.steps()
    assert client.progress(later) == []
    assert client.engine.next_deadline_s() == pytest.approx(client.clock.now() + 1.0)
    client.clock.advance(0.9)
    client.revise(later, (5,))
    client.clock.advance(0.2)
    client.steps()
    assert client.progress(later)[-1] == 30


def test_one_that_has_lost_its_blocks_asks_for_none_before_it_is_revised(make_client, prompt_of):
    client = make_client(num_blocks=12, order=FCFS)
    stream = fill(client, prompt_of, 41)
    client.run(prompt_of(2, 30), max_tokens=1)
    assert client.progress(stream) == [40]
    client.revise(stream, (5,))
    client.steps()
    assert client.progress(stream) == [40, 41]


def test_one_that_lost_its_blocks_in_the_middle_gets_them_back_however_long_that_takes(make_client, prompt_of):
    """Its owner may wait for what it has sent to be computed before it sends more."""
    client = make_client(num_blocks=12, order=FCFS, budget=8)
    stream = client.open(prompt_of(1, 41), is_open=True)
    client.steps(3)
    assert 0 < client.progress(stream)[-1] < 40
    asker = client.open(prompt_of(2, 40), max_tokens=4, ignore_eos=True)
    client.steps(1)
    assert client.engine.stats().num_preemptions == 1
    client.clock.advance(2.0)
    client.steps()
    assert len(client.tokens(asker)) == 4
    assert client.progress(stream)[-1] == 40


def test_a_sequence_whose_blocks_are_being_read_keeps_them(make_client, prompt_of):
    client = make_client(num_blocks=12, order=FCFS)
    stream = fill(client, prompt_of, 41, goal=Goal.FIRST_TOKEN)
    other = client.open(prompt_of(2, 30))
    client.steps()
    assert client.tokens(other) == []
    client.settle(stream)
    client.steps()
    assert client.tokens(other)


def test_blocks_that_an_update_gives_up_are_not_reused_while_they_are_read(make_client, prompt_of):
    client = make_client(num_blocks=12, order=FCFS)
    stream = fill(client, prompt_of, 41, goal=Goal.FIRST_TOKEN)
    client.revise(stream, keep=4)
    client.steps()
    assert client.stats().leased_blocks == 11
    client.settle(stream)
    assert client.stats().leased_blocks == 1


def test_a_late_close_of_a_version_whose_blocks_are_being_read_gives_up_more_of_them(make_client, reference, prompt_of):
    client = make_client(num_blocks=12, order=FCFS)
    stream = fill(client, prompt_of, 41, goal=Goal.FIRST_TOKEN)
    client.revise(stream, keep=34, closed=True, is_late=True)
    client.steps()
    client.settle(stream)
    assert client.tokens(stream) == reference(prompt_of(1, 34), max_tokens=1)


def test_a_prompt_that_outgrows_the_pool_pushes_out_the_worst_ranked(make_client, reference, prompt_of):
    client = make_client(num_blocks=12, order=FCFS, budget=16)
    streams = [client.open(prompt_of(seed, 12), is_open=True) for seed in (1, 2, 3)]
    client.steps()
    client.revise(streams[0], prompt_of(4, 20))
    client.steps()
    assert client.progress(streams[0])[-1] == 31
    assert client.stats().num_preemptions == 1
    for stream in streams:
        client.revise(stream, closed=True)
        client.steps()
        assert client.tokens(stream) == reference(client.prompts[stream])
    assert client.progress(streams[1])[-1] == 12


def test_places_are_taken_from_open_prompts_like_blocks(make_client, reference, prompt_of):
    client = make_client(max_running=2, order=FCFS)
    streams = [fill(client, prompt_of, 9, seed) for seed in (1, 2)]
    assert client.run(prompt_of(3, 9)) == reference(prompt_of(3, 9))
    for seed, stream in zip((1, 2), streams, strict=True):
        client.revise(stream, closed=True)
        client.steps()
        assert client.tokens(stream) == reference(prompt_of(seed, 9))


def test_one_that_waits_long_for_its_first_blocks_gets_them(make_client, prompt_of):
    client = make_client(num_blocks=8, order=FCFS)
    other = client.open(prompt_of(1, 20), begins=False)
    client.steps()
    stream = client.open(prompt_of(2, 16), is_open=True)
    client.clock.advance(1.5)
    client.close(other)
    client.steps()
    assert client.progress(stream) == [15]


def test_one_that_closes_while_it_waits_is_no_open_prompt_any_more(make_client, prompt_of):
    client = make_client(num_blocks=8, order=FCFS)
    other = client.open(prompt_of(1, 20), begins=False)
    client.steps()
    stream = client.open(prompt_of(2, 16), is_open=True, max_tokens=1)
    later = client.open(prompt_of(3, 30), max_tokens=1, begins=False)
    client.revise(stream, closed=True)
    client.close(other)
    client.steps(3)
    assert client.tokens(stream)
    client.steps()
    assert client.admitted(later)


@pytest.mark.parametrize("arrives_whole", [False, True], ids=["computed here", "sent by a peer"])
def test_nobody_waits_for_blocks_of_a_prompt_that_may_stay_open(make_client, reference, prompt_of, arrives_whole):
    client, prompt = make_client(order=FCFS), prompt_of(1, 20)
    client.open(prompt, is_open=True, num_final=20, arrives_whole=arrives_whole, begins=not arrives_whole)
    client.steps()
    assert client.run((*prompt, 5)) == reference((*prompt, 5))


def test_prompts_in_one_piece_push_out_no_more_than_they_need(make_client, prompt_of, whole_shape):
    client = make_client(num_blocks=40, budget=16, shape=whole_shape)
    stream = client.open(prompt_of(1, 8), is_open=True)
    for seed in range(2, 6):
        client.open(prompt_of(seed, 20), max_tokens=40, ignore_eos=True)
    client.steps(8)
    client.revise(stream, prompt_of(9, 80))
    client.steps(1)
    assert 0 < client.stats().num_preemptions <= 2


def test_a_shared_block_without_a_name_is_not_changed(make_client, reference, prompt_of):
    client, prompt = make_client(), prompt_of(1, 20)
    stream = client.open(prompt, is_open=True, num_final=20)
    client.steps()
    other = client.open((*prompt[:16], 7), max_tokens=30, ignore_eos=True)
    client.steps(3)
    second = client.admitted(other).block_hashes[1]
    client.engine.apply(Quarantine(block_hash=second, reply=lambda _: None))
    client.revise(stream, prompt_of(2, 9), keep=6, closed=True)
    client.steps()
    assert client.tokens(other) == reference((*prompt[:16], 7), max_tokens=30, ignore_eos=True)


def test_a_quarantined_block_that_was_shared_does_not_get_its_name_back(make_client, prompt_of):
    client, prompt = make_client(), prompt_of(1, 17)
    first = client.open(prompt, max_tokens=1)
    client.steps()
    stream = client.open(prompt[:3], is_open=True)
    client.steps()
    client.revise(stream, prompt[3:])
    client.steps()
    third = client.admitted(first).block_hashes[2]
    client.engine.apply(Quarantine(block_hash=third, reply=lambda _: None))
    client.revise(stream, closed=True)
    client.steps()
    assert len(client.pin("look", client.admitted(first).block_hashes)) == 2
    client.engine.apply(Unpin(lease_id="look"))


# -- Host memory --------------------------------------------------------------


def test_host_memory_is_bounded(make_client, reference, prompt_of):
    client = make_client(num_blocks=12, order=FCFS, preempt=SwapAlways(), num_swap_blocks=5)
    streams = [fill(client, prompt_of, 17, seed) for seed in (1, 2)]
    client.run(prompt_of(3, 40), max_tokens=1)
    num_computed = sum(computed(client))
    for stream in streams:
        client.revise(stream, closed=True)
    client.steps()
    for seed, stream in zip((1, 2), streams, strict=True):
        assert client.tokens(stream) == reference(prompt_of(seed, 17))
    # One came back from host memory, for the other there was no room.
    again = sum(computed(client)) - num_computed - sum(len(client.tokens(stream)) - 1 for stream in streams)
    assert again == 17 + 1


def test_host_memory_is_given_back_whatever_ends_a_sequence(make_client, prompt_of):
    client = make_client(num_blocks=12, order=FCFS, preempt=SwapAlways(), num_swap_blocks=11)
    for end in (client.close, lambda stream: client.revise(stream, keep=99)):
        stream = fill(client, prompt_of, 41)
        client.run(prompt_of(2, 40), max_tokens=1)
        end(stream)
        client.steps()
        again = fill(client, prompt_of, 41, seed=4)
        client.run(prompt_of(5, 40), max_tokens=1)
        num_computed = sum(computed(client))
        client.revise(again, closed=True)
        client.steps(1)
        assert sum(computed(client)) - num_computed <= 1
        client.close(again)


@pytest.mark.parametrize("keep", [0, 6, 8, 31])
def test_an_update_of_a_saved_prompt_shortens_what_comes_back(make_client, reference, prompt_of, keep):
    client = make_client(num_blocks=12, order=FCFS, preempt=SwapAlways(), num_swap_blocks=12)
    stream = fill(client, prompt_of, 31)
    client.run(prompt_of(2, 30), max_tokens=1)
    client.revise(stream, prompt_of(3, 3), keep=keep, closed=True)
    num_computed = sum(computed(client))
    client.steps()
    assert client.tokens(stream) == reference((*prompt_of(1, 31)[:keep], *prompt_of(3, 3)))
    again = sum(computed(client)) - num_computed - len(client.tokens(stream)) + 1
    assert again == 3 + (keep == 31)


# -- Any script ---------------------------------------------------------------

SAMPLING = {"max_tokens": 5, "ignore_eos": True}
OPERATIONS = ("append", "append", "update", "steps", "steps", "rest", "other")


class Script:
    """Four streams and their competitors, in random order on a pool that is too small for them."""

    def __init__(self, client, prompt_of, seed):
        self.client, self.prompt_of = client, prompt_of
        self.random = random.Random(seed)
        self.goals = [self.random.choice(list(Goal)) for _ in range(4)]
        self.is_final = [self.random.random() < 0.5 for _ in range(4)]
        self.streams = [client.open((), is_open=True, goal=goal, **SAMPLING) for goal in self.goals]
        self.others = []

    def piece(self):
        """Few seeds, so that prompts have prefixes in common."""
        return self.prompt_of(self.random.choice([1, 2, 3]), self.random.randint(0, 14))

    def run(self, num_operations):
        for _ in range(num_operations):
            self._do(self.random.choice(OPERATIONS), self.random.randrange(4))
        for index in self.random.sample(range(4), 4):
            has_prompt = self.client.prompts[self.streams[index]] != ()
            piece = () if has_prompt and self.random.random() < 0.5 else self.piece() or (5,)
            self.client.revise(self.streams[index], piece, closed=True, is_late=self.random.random() < 0.5)
            self.client.steps(2)
        for _ in range(6):
            self.client.steps()
            for stream, goal in zip(self.streams, self.goals, strict=True):
                self.client.settle(stream)
                if goal is Goal.FIRST_TOKEN and self.client.tokens(stream):
                    self.client.close(stream)

    def _do(self, operation, index):
        client, stream = self.client, self.streams[index]
        known = len(client.prompts[stream])
        match operation:
            case "append" if known < 40:
                client.revise(stream, self.piece(), is_final=self.is_final[index])
            case "update":
                keep = self.random.randint(0, known)
                client.revise(stream, self.piece(), keep=keep, is_final=self.is_final[index])
            case "steps":
                client.steps(self.random.randint(1, 4))
            case "rest":
                client.settle(stream)
                client.clock.advance(0.4)
                client.steps(20)
            case "other":
                self.others.append(client.open(self.piece() or (5,), **SAMPLING))


@pytest.mark.parametrize("order", ["fcfs", "lcas", "mcps", "default"])
@pytest.mark.parametrize(
    "preempt",
    [RECOMPUTE_ALWAYS, SwapAlways(), PreemptByCost(COST)],
    ids=["recompute", "swap", "auto"],
)
def test_any_script_has_the_tokens_of_its_final_prompts(make_client, reference, prompt_of, order, preempt):
    num_preemptions = 0
    for seed in range(40):
        num_blocks = (18, 22, 28)[seed % 3]
        client = make_client(
            num_blocks=num_blocks,
            budget=8,
            order=FirstComeFirstServed() if order == "default" else make_order(order),
            preempt=preempt,
            num_swap_blocks=num_blocks // 2,
        )
        script = Script(client, prompt_of, seed)
        script.run(50)
        for stream, goal in zip(script.streams, script.goals, strict=True):
            wanted = reference(client.prompts[stream], **SAMPLING)
            assert client.tokens(stream) == (wanted[:1] if goal is Goal.FIRST_TOKEN else wanted), seed
        for other in script.others:
            assert client.tokens(other) == reference(client.prompts[other], **SAMPLING), seed
        num_preemptions += client.stats().num_preemptions
        client.end()
    assert num_preemptions > 40
