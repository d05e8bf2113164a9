"""Any order of commands: the engine never runs out of blocks it planned with, and never serves wrong KV."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.core.request import Token
from headrace.engine.messages import (
    Admitted,
    Close,
    Failed,
    Goal,
    HoldWriter,
    Quarantine,
    ReleaseWriter,
    Sampled,
    Unpin,
)
from headrace.engine.scheduler import WholeShape
from headrace.techniques.sarathi.shape import ChunkedShape

PROMPTS = st.tuples(st.integers(0, 3), st.integers(1, 30))
PICK = st.integers(0, 50)


class EngineMachine(RuleBasedStateMachine):
    """Workers, peers and the clock act on one engine in any order; `make` and `reference` come from fixtures."""

    make = None
    reference = None
    prompt_of = None

    @initialize(
        num_blocks=st.integers(9, 24),
        budget=st.sampled_from([1, 5, 16, 64]),
        max_running=st.integers(1, 5),
        is_whole=st.booleans(),
    )
    def start(self, num_blocks, budget, max_running, is_whole):
        shape = WholeShape() if is_whole else ChunkedShape()
        self.client = type(self).make(num_blocks=num_blocks, budget=budget, max_running=max_running, shape=shape)
        self.wanted = {}
        self.held = set()
        self.closed = set()
        self.pins = {}
        self.writers = {}
        self.num_ids = 0

    def fresh(self, kind):
        self.num_ids += 1
        return f"{kind}{self.num_ids}"

    def pick(self, number, among):
        among = sorted(among)
        return among[number % len(among)]

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 12), key=st.integers(0, 3), life_s=st.sampled_from([3.0, 1e6]))
    def open_answer(self, prompt, max_tokens, key, life_s):
        self._open(prompt, Goal.ANSWER, max_tokens, key, life_s, begins=True)

    @rule(prompt=PROMPTS, key=st.integers(0, 3), begins=st.booleans())
    def open_prefill(self, prompt, key, begins):
        self._open(prompt, Goal.FIRST_TOKEN, 8, key, 1e6, begins=begins)

    @rule(prompt=PROMPTS, key=st.integers(0, 3), life_s=st.sampled_from([3.0, 1e6]))
    def open_decode(self, prompt, key, life_s):
        self._open(prompt, Goal.ANSWER, 9, key, life_s, begins=False)

    def _open(self, prompt, goal, max_tokens, key, life_s, *, begins):
        tokens = type(self).prompt_of(*prompt)
        options = {"max_tokens": max_tokens, "temperature": 0.9 if key else 0.0, "seed": key}
        sequence = self.client.open(tokens, goal=goal, begins=begins, life_s=life_s, **options)
        self.wanted[sequence] = (tokens, goal, options)
        if not begins:
            self.held.add(sequence)

    def admitted(self, among):
        """Those of the sequences that were admitted and have not failed."""
        events = self.client.events
        return [
            each
            for each in among
            if any(isinstance(event, Admitted) for event in events[each]) and self.client.error(each) is None
        ]

    def ready(self):
        """Those that may begin: nobody writes to their blocks any more."""
        written = {sequence for sequence, _ in self.writers.values()}
        return [each for each in self.admitted(self.held) if each not in written]

    @precondition(lambda self: self.ready())
    @rule(number=PICK, has_all=st.booleans())
    def begin(self, number, has_all):
        """A peer has pushed everything with its first token, or nothing has come and all is computed here."""
        sequence = self.pick(number, self.ready())
        self.held.remove(sequence)
        tokens, goal, options = self.wanted[sequence]
        admitted = self.client.admitted(sequence)
        if not has_all or goal is Goal.FIRST_TOKEN:
            self.client.begin(sequence, admitted.num_cached_tokens)
            return
        own = admitted.num_cached_tokens
        self.client.runner.write(admitted.block_ids, tokens[own:], own)
        first = type(self).reference(tokens, **options)[0]
        self.client.begin(sequence, len(tokens), Token(cursor=0, token_id=first))

    @precondition(lambda self: set(self.wanted) - self.closed)
    @rule(number=PICK)
    def close(self, number):
        sequence = self.pick(number, set(self.wanted) - self.closed)
        self.client.engine.apply(Close(sequence_id=sequence))
        self.closed.add(sequence)
        self.held.discard(sequence)

    @precondition(lambda self: self.admitted(self.wanted))
    @rule(number=PICK, count=st.integers(1, 6))
    def pin(self, number, count):
        hashes = self.client.admitted(self.pick(number, self.admitted(self.wanted))).block_hashes[:count]
        lease_id = self.fresh("p")
        blocks = self.client.pin(lease_id, hashes, self.client.clock.now() + 5.0)
        if blocks:
            self.pins[lease_id] = (blocks, hashes[: len(blocks)], self.client.clock.now() + 5.0)

    @precondition(lambda self: self.pins)
    @rule(number=PICK)
    def unpin(self, number):
        lease_id = self.pick(number, self.pins)
        self.client.engine.apply(Unpin(lease_id=lease_id))
        del self.pins[lease_id]

    @precondition(lambda self: self.client.engine._cache.ledger.names())
    @rule(number=PICK)
    def quarantine(self, number):
        block_hash = self.pick(number, self.client.engine._cache.ledger.names())
        was_here = []
        self.client.engine.apply(Quarantine(block_hash=block_hash, reply=was_here.append))
        assert was_here == [True]
        for name, (blocks, hashes, end_s) in self.pins.items():
            if block_hash in hashes:
                num_left = hashes.index(block_hash)
                self.pins[name] = (blocks[:num_left], hashes[:num_left], end_s)

    @precondition(lambda self: self.admitted(self.held))
    @rule(number=PICK)
    def write(self, number):
        """A peer's transfer starts."""
        sequence = self.pick(number, self.admitted(self.held))
        admitted = self.client.admitted(sequence)
        own = admitted.num_cached_tokens // 4
        blocks = admitted.block_ids[own:]
        writer_id = self.fresh("w")
        self.client.engine.apply(HoldWriter(writer_id=writer_id, block_ids=blocks))
        self.writers[writer_id] = (sequence, blocks)

    @precondition(lambda self: self.writers)
    @rule(number=PICK)
    def settle(self, number):
        """The transfer ends, without success; until now it wrote, even if the sequence is closed."""
        writer_id = self.pick(number, self.writers)
        _, blocks = self.writers.pop(writer_id)
        self.client.runner.write(blocks, (1,) * (4 * len(blocks)))
        self.client.engine.apply(ReleaseWriter(writer_id=writer_id))

    @rule(count=st.integers(1, 8))
    def step(self, count):
        self.client.steps(count)
        self.forget_late_pins()

    @rule(seconds=st.sampled_from([0.5, 4.0]))
    def wait(self, seconds):
        self.client.clock.advance(seconds)
        self.client.steps(1)
        self.forget_late_pins()

    def forget_late_pins(self):
        now_s = self.client.clock.now()
        self.pins = {name: pin for name, pin in self.pins.items() if pin[2] > now_s}

    @invariant()
    def pinned_blocks_keep_their_names(self):
        for blocks, hashes, _ in self.pins.values():
            assert self.client.engine._cache.ledger.match(hashes) == blocks

    @invariant()
    def what_was_told_of_the_cache_is_true_after_a_step(self):
        self.client.engine._announce()
        known = set()
        for change in self.client.changes:
            known = (known | set(change.stored)) - set(change.removed)
        assert known == set(self.client.engine._cache.ledger.names())

    @invariant()
    def tokens_are_those_of_the_model(self):
        for sequence, (tokens, _, options) in self.wanted.items():
            found = self.client.tokens(sequence)
            if found:
                assert found == type(self).reference(tokens, **options)[: len(found)]

    def teardown(self):
        """When the peers have let go, everyone is answered, once."""
        for lease_id in self.pins:
            self.client.engine.apply(Unpin(lease_id=lease_id))
        for writer_id in self.writers:
            self.client.engine.apply(ReleaseWriter(writer_id=writer_id))
        for sequence, (_, goal, _) in self.wanted.items():
            if goal is Goal.FIRST_TOKEN or sequence in self.held or self.client.error(sequence):
                self.client.close(sequence)
                self.closed.add(sequence)
        self.client.steps()
        for sequence in set(self.wanted) - self.closed:
            events = self.client.events[sequence]
            ends = [each for each in events if isinstance(each, Failed)]
            ends += [each for each in events if isinstance(each, Sampled) and each.token.finish]
            assert len(ends) == 1, (sequence, events)
        self.client.end()


@pytest.fixture
def machine(make_client, reference, prompt_of):
    answers = {}

    def remembered(tokens, **options):
        key = (tokens, *sorted(options.items()))
        if key not in answers:
            answers[key] = reference(tokens, **options)
        return answers[key]

    fixtures = {"make": make_client, "reference": remembered, "prompt_of": prompt_of}
    return type("Machine", (EngineMachine,), {name: staticmethod(each) for name, each in fixtures.items()})


def test_any_order_of_commands_gives_right_tokens_and_loses_no_block(machine):
    case = machine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    case("runTest").runTest()
