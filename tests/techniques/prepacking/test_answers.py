"""The engine's answers are the same however the chunks of a step lie: ragged, preempted, with prefix hits, seeded."""

import pytest

from headrace.clock import VirtualClock
from headrace.core.request import SamplingParams, SequenceId, SequenceSpec
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import Admitted, Begin, Close, Failed, Goal, Open, Sampled
from headrace.engine.scheduler import FirstComeFirstServed, WholeShape
from headrace.techniques.sarathi.shape import ChunkedShape

GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 1.3, "top_p": 0.95}
STEPS_MAX = 2000
SHARED = tuple((11 * index + 4) % 80 + 3 for index in range(21))


def prompts():
    """Lengths from 1 to 40; every third prompt begins like the others of its kind."""
    made = []
    for number, length in enumerate((40, 1, 9, 23, 2, 31, 17, 12, 5, 38, 3, 27)):
        own = tuple((number * 19 + 5 * index) % 80 + 3 for index in range(length))
        made.append(SHARED + own[:8] if number % 3 == 2 else own)
    return made


class Answers:
    """Runs prompts through an engine in two waves; keeps tokens and what the engine did."""

    def __init__(self, runner, shape, *, budget=4096, num_blocks=200, max_running=1):
        self._clock = VirtualClock(1000.0)
        bounds = EngineConfig(num_blocks=num_blocks, token_budget=budget, max_running=max_running, fingerprint="model")
        self._engine = Engine(
            runner,
            bounds,
            order=FirstComeFirstServed(),
            shape=shape,
            clock=self._clock,
            on_cache_change=lambda change: None,
        )
        self._admitted = []
        self.tokens = {}
        self.num_cached = 0

    def run(self):
        for number, prompt in enumerate(prompts()):
            self._open(number, prompt)
            if number == 7:
                self._steps(5)
        self._steps(STEPS_MAX)
        stats = self._engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.leased_blocks) == (0, 0, 0)
        self.num_preemptions = stats.num_preemptions
        return self

    def _open(self, number, prompt):
        sampling = SEEDED | {"seed": number} if number % 2 else GREEDY
        spec = SequenceSpec(
            sequence_id=SequenceId(f"s{number}"),
            model="m",
            prompt=prompt,
            sampling=SamplingParams(**sampling, max_tokens=20, ignore_eos=True),
            deadline_unix_ms=self._clock.unix_ms() + 10**9,
        )
        self.tokens[spec.sequence_id] = []
        self._engine.apply(Open(spec=spec, goal=Goal.ANSWER, sink=self._take))

    def _take(self, event):
        match event:
            case Admitted():
                self._admitted.append(event)
            case Sampled(sequence_id=sequence_id, token=token):
                self.tokens[sequence_id].append(token.token_id)
            case Failed():
                raise event.error

    def _steps(self, count):
        for _ in range(count):
            begun, self._admitted = self._admitted, []
            for event in begun:
                self.num_cached += event.num_cached_tokens
                self._engine.apply(Begin(sequence_id=event.sequence_id, num_present=event.num_cached_tokens))
            if not self._engine.step() and not begun and not self._admitted:
                break
            self._engine._cache.ledger.verify()
        if count == STEPS_MAX:
            for sequence_id in self.tokens:
                self._engine.apply(Close(sequence_id=sequence_id))


class Noting:
    """A policy that notes what it packs."""

    def __init__(self, policy):
        self._policy = policy
        self.packed = []

    def pack(self, lengths):
        self.packed.append(tuple(lengths))
        return self._policy.pack(lengths)


@pytest.fixture(scope="module")
def wanted(exact_model, make_runner):
    """One sequence at a time, each prompt whole, nothing preempted."""
    return Answers(make_runner(exact_model, "varlen", num_blocks=200), WholeShape()).run()


@pytest.mark.parametrize(("shape", "budget"), [(ChunkedShape(), 7), (WholeShape(), 64)], ids=["chunked", "whole"])
@pytest.mark.parametrize("pack", ["varlen", "bins", "pad"])
def test_answers_are_those_of_each_prompt_alone(exact_model, make_runner, wanted, pack, budget, shape):
    found = Answers(make_runner(exact_model, pack), shape, budget=budget, num_blocks=40, max_running=6).run()
    assert found.tokens == wanted.tokens
    assert found.num_preemptions > 0
    assert found.num_cached > 0


def test_the_answers_compared_are_whole_and_differ(wanted):
    assert wanted.num_preemptions == 0
    assert all(len(tokens) == 20 for tokens in wanted.tokens.values())
    assert len(set(map(tuple, wanted.tokens.values()))) == len(wanted.tokens)


def test_the_steps_compared_pack_chunks_of_several_lengths(exact_model, make_runner):
    runner = make_runner(exact_model, "bins")
    noting = runner._pack = Noting(runner._pack)
    Answers(runner, ChunkedShape(), budget=64, num_blocks=40, max_running=6).run()
    assert max(len(set(lengths)) for lengths in noting.packed) > 2
