"""A sequence that computes while its fetched KV still lands: the same tokens, and never a step on what did not."""

import threading

import pytest

from headrace.clock import WallClock
from headrace.core.request import FinishReason
from headrace.engine.landing import Landing, NotLanded
from headrace.engine.messages import Admitted, Close, Goal, Progress, StartEarly

BLOCK = 4
LIMIT_S = 5.0


class Fetch:
    """Delivers the KV of a held sequence as a fetch does, on a thread of its own."""

    def __init__(self, client, sequence_id, prompt, num_present, limit_s=LIMIT_S):
        self.client, self.sequence_id, self.prompt = client, sequence_id, prompt
        self.landing = Landing(num_present, WallClock().now() + limit_s, WallClock())
        client.engine.apply(StartEarly(sequence_id=sequence_id, landing=self.landing))

    def deliver(self, *, is_believed=True, num_layers=2):
        """Write after the engine has begun to wait, layer by layer; the KV is whole with the last one."""

        def write():
            self.landing.land(1)
            if num_layers == 2:
                table = self.client.admitted(self.sequence_id).block_ids
                self.client.runner.write(table, tuple(self.prompt[: self.landing.num_present]))
                self.landing.land(2)
            self.landing.end(is_believed=is_believed)

        self.thread = threading.Timer(0.05, write)
        self.thread.start()


def held(make_client, prompt, **more):
    client = make_client(**more)
    sequence_id = client.open(prompt, begins=False, max_tokens=6)
    client.steps()
    return client, sequence_id


@pytest.mark.parametrize("num_present", [4, 20])
def test_tokens_are_those_of_a_sequence_that_computed_everything(make_client, reference, prompt_of, num_present):
    prompt = prompt_of(1, 22)
    client, early = held(make_client, prompt)
    fetch = Fetch(client, early, prompt, num_present)
    fetch.deliver()
    client.steps()
    client.begin(early, num_present)
    client.steps()
    assert client.tokens(early) == reference(prompt, max_tokens=6)
    assert client.stats().computed_tokens == 22 - num_present + 5
    client.at_rest()


def test_blocks_are_found_by_others_only_after_all_of_it_was_believed(make_client, prompt_of):
    prompt = prompt_of(1, 22)
    client, early = held(make_client, prompt)
    fetch = Fetch(client, early, prompt, 20)
    assert not client.changes
    fetch.deliver()
    client.steps()
    assert [len(change.stored) for change in client.changes][:1] == [5]


@pytest.mark.parametrize(("is_believed", "num_layers"), [(False, 2), (False, 1), (True, 1)])
def test_a_fetch_that_ends_badly_costs_a_step_and_no_token(make_client, reference, prompt_of, is_believed, num_layers):
    prompt = prompt_of(1, 22)
    client, early = held(make_client, prompt)
    other = client.open(prompt_of(2, 6), max_tokens=6)
    fetch = Fetch(client, early, prompt, 20, limit_s=0.2)
    if num_layers == 2 or not is_believed:
        fetch.deliver(is_believed=is_believed, num_layers=num_layers)
    client.steps()
    assert client.tokens(other) == reference(prompt_of(2, 6), max_tokens=6)
    assert not [event for event in client.events[early] if not isinstance(event, Admitted)]
    assert all(len(change.stored) < 5 for change in client.changes)
    client.begin(early, 0)
    client.steps()
    assert client.tokens(early) == reference(prompt, max_tokens=6)
    client.at_rest()


def test_a_begin_that_overtakes_the_step_starts_it_as_usual(make_client, reference, prompt_of):
    prompt = prompt_of(1, 22)
    client, early = held(make_client, prompt)
    fetch = Fetch(client, early, prompt, 20)
    fetch.landing.end(is_believed=False)
    client.begin(early, 0)
    client.steps()
    assert client.tokens(early) == reference(prompt, max_tokens=6)
    client.at_rest()


def test_a_first_token_is_reported_with_all_that_landed(make_client, prompt_of):
    prompt = prompt_of(1, 22)
    client = make_client()
    early = client.open(prompt, begins=False, goal=Goal.FIRST_TOKEN)
    client.steps()
    Fetch(client, early, prompt, 16).deliver()
    client.steps()
    client.begin(early, 16)
    client.steps()
    [progress] = [event for event in client.events[early] if isinstance(event, Progress)]
    assert progress.num_computed == 22
    assert len(client.tokens(early)) == 1
    client.close(early)
    client.at_rest()


def test_closing_one_that_still_lands_leaves_nothing(make_client, prompt_of):
    prompt = prompt_of(1, 22)
    client, early = held(make_client, prompt)
    fetch = Fetch(client, early, prompt, 20)
    client.engine.apply(Close(sequence_id=early))
    client.steps()
    fetch.landing.end(is_believed=False)
    assert not client.changes
    client.at_rest()


def test_one_that_still_lands_is_not_evicted_for_others(make_client, reference, prompt_of):
    prompt = prompt_of(1, 22)
    client, early = held(make_client, prompt, num_blocks=9)
    other = client.open(prompt_of(2, 9), max_tokens=8)
    Fetch(client, early, prompt, 20).deliver()
    client.steps()
    client.begin(early, 20)
    client.steps()
    assert client.tokens(early) == reference(prompt, max_tokens=6)
    assert client.tokens(other) == reference(prompt_of(2, 9), max_tokens=8)
    assert client.sampled(early)[-1].finish is FinishReason.LENGTH
    client.at_rest()


@pytest.mark.parametrize("num_present", [22, 40])
def test_a_landing_that_leaves_nothing_to_compute_is_refused(make_client, prompt_of, num_present, caplog):
    client, early = held(make_client, prompt_of(1, 22))
    Fetch(client, early, prompt_of(1, 22), num_present)
    assert "command refused" in caplog.text
    client.steps()
    assert not client.tokens(early)


def test_waiting_ends_at_the_deadline_and_when_nothing_lands_any_more():
    landing = Landing(4, WallClock().now() + 0.05, WallClock())
    landing.land(1)
    landing.wait_layer(0)
    with pytest.raises(NotLanded):
        landing.wait_layer(1)
    gone = Landing(4, WallClock().now() + 60, WallClock())
    gone.end(is_believed=False)
    gone.end(is_believed=True)
    for wait in (lambda: gone.wait_layer(0), gone.wait_end):
        with pytest.raises(NotLanded):
            wait()
