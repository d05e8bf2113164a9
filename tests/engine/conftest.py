"""An engine on a fake runner and a virtual clock, and a client that answers its events as a worker would."""

import pytest

from headrace.clock import VirtualClock
from headrace.core.block import BlockId
from headrace.core.request import Revision, SamplingParams, SequenceId, SequenceSpec
from headrace.engine.batch import Batch, batch_item
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import (
    Admitted,
    Begin,
    Close,
    Extended,
    Failed,
    Goal,
    Open,
    Pin,
    Progress,
    Revise,
    Sampled,
    Settle,
)
from headrace.engine.sampler import SamplingRow, sample
from headrace.engine.scheduler import RECOMPUTE_ALWAYS, FirstComeFirstServed, WholeShape
from headrace.techniques.sarathi.shape import ChunkedShape
from headrace.testing.runner import FakeRunner

STEPS_MAX = 20_000
BLOCK = 4


class Client:
    """Opens sequences and, unless told not to, begins what is admitted."""

    def __init__(  # noqa: PLR0913 what an engine is made of
        self,
        *,
        num_blocks=64,
        budget=64,
        max_running=8,
        shape=None,
        context=4096,
        order=None,
        cost=None,
        preempt=RECOMPUTE_ALWAYS,
        num_swap_blocks=0,
    ):
        self.clock = VirtualClock(1000.0)
        self.runner = FakeRunner(num_blocks, block_tokens=BLOCK, vocab_size=64, max_context_tokens=context)
        self.changes = []
        self.engine = Engine(
            self.runner,
            EngineConfig(
                num_blocks=num_blocks,
                token_budget=budget,
                max_running=max_running,
                fingerprint="model",
                cost=cost,
                num_swap_blocks=num_swap_blocks,
            ),
            order=order or FirstComeFirstServed(),
            shape=shape or ChunkedShape(),
            clock=self.clock,
            on_cache_change=self.changes.append,
            preempt=preempt,
        )
        self.events = {}
        self.prompts = {}
        self.versions = {}
        self.num_opened = 0
        self.answers = []

    def open(  # noqa: PLR0913 what a request may say
        self,
        prompt,
        *,
        goal=Goal.ANSWER,
        begins=True,
        arrives_whole=False,
        is_open=False,
        num_final=0,
        life_s=1e6,
        output=(),
        choice=0,
        salt=b"",
        **sampling,
    ):
        sequence_id = SequenceId(f"s{self.num_opened}")
        self.num_opened += 1
        sampling = {"temperature": 0.0, "max_tokens": 8, **sampling}
        spec = SequenceSpec(
            sequence_id=sequence_id,
            model="m",
            prompt=tuple(prompt),
            output=tuple(output),
            sampling=SamplingParams(**sampling),
            choice=choice,
            deadline_unix_ms=self.clock.unix_ms() + int(life_s * 1000),
            cache_key=salt,
        )
        events = self.events[sequence_id] = []

        def sink(event):
            events.append(event)
            if isinstance(event, Admitted) and begins:
                self.answers.append(Begin(sequence_id=sequence_id, num_present=event.num_cached_tokens))

        self.prompts[sequence_id], self.versions[sequence_id] = tuple(prompt), 0
        opening = Open(
            spec=spec, goal=goal, sink=sink, arrives_whole=arrives_whole, is_open=is_open, num_final=num_final
        )
        self.engine.apply(opening)
        return sequence_id

    def revise(self, sequence_id, tokens=(), *, keep=None, closed=False, is_final=False, is_late=False):
        """Keep the first tokens of a prompt, or all of them, and put others behind them.

        A close that is late is a revision of its own, of the version that it closes.
        """
        if is_late:
            self.revise(sequence_id, tokens, keep=keep)
            self.versions[sequence_id] -= 1
            self.revise(sequence_id, closed=closed)
            return
        keep = len(self.prompts[sequence_id]) if keep is None else keep
        self.prompts[sequence_id] = (*self.prompts[sequence_id][:keep], *tokens)
        self.versions[sequence_id] += 1
        self.engine.apply(
            Revise(
                sequence_id=sequence_id,
                revision=Revision(
                    version=self.versions[sequence_id],
                    num_kept=keep,
                    tokens=tuple(tokens),
                    num_final=len(self.prompts[sequence_id]) if is_final else 0,
                    is_closed=closed,
                ),
            )
        )

    def settle(self, sequence_id):
        """Say that nothing reads the blocks of a sequence."""
        self.engine.apply(Settle(sequence_id=sequence_id, num_progress=len(self.progress(sequence_id))))

    def extended(self, sequence_id):
        return [event for event in self.events[sequence_id] if isinstance(event, Extended)]

    def begin(self, sequence_id, num_present, first=None):
        self.engine.apply(Begin(sequence_id=sequence_id, num_present=num_present, first=first))

    def close(self, sequence_id):
        self.engine.apply(Close(sequence_id=sequence_id))

    def steps(self, count=None):
        """Step until there is nothing to do, or `count` times; checks the ledger after each."""
        for _ in range(count or STEPS_MAX):
            had_answers = bool(self.answers)
            while self.answers:
                self.engine.apply(self.answers.pop(0))
            if not self.engine.step() and not self.answers and not had_answers:
                return
            self.engine._cache.ledger.verify()
        assert count is not None, "the engine does not come to rest"

    def run(self, prompt, **options):
        """Return the tokens of one answer."""
        sequence_id = self.open(prompt, **options)
        self.steps()
        return self.tokens(sequence_id)

    def tokens(self, sequence_id):
        return [token.token_id for token in self.sampled(sequence_id)]

    def sampled(self, sequence_id):
        return [event.token for event in self.events[sequence_id] if isinstance(event, Sampled)]

    def finish(self, sequence_id):
        return self.sampled(sequence_id)[-1].finish

    def progress(self, sequence_id):
        return [event.num_computed for event in self.events[sequence_id] if isinstance(event, Progress)]

    def admitted(self, sequence_id):
        return next(event for event in self.events[sequence_id] if isinstance(event, Admitted))

    def error(self, sequence_id):
        failures = [event.error for event in self.events[sequence_id] if isinstance(event, Failed)]
        assert len(failures) <= 1
        return failures[0] if failures else None

    def pin(self, lease_id, hashes, deadline_s=2000.0):
        found = []
        self.engine.apply(Pin(lease_id=lease_id, block_hashes=hashes, deadline_s=deadline_s, reply=found.append))
        return found[0]

    def end(self):
        """Close everything; the ledger must be where it began."""
        for sequence_id in self.events:
            self.close(sequence_id)
        self.at_rest()

    def at_rest(self):
        """Nobody has blocks or waits for them."""
        self.engine._cache.ledger.verify()
        stats = self.stats()
        assert (stats.leased_blocks, stats.num_leases, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)

    def stats(self):
        stats = self.engine.stats()
        assert stats.free_blocks + stats.cached_blocks + stats.leased_blocks == stats.total_blocks
        return stats


def prompt_of(seed, length):
    """A prompt without EOS (2); equal seeds share their prefix."""
    return tuple(3 + (seed * 7919 + index * (seed + 13) + index * index) % 61 for index in range(length))


def reference(prompt, choice=0, **sampling):
    """The answer by the definition: one sequence, its own memory, everything computed anew for each token."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
    runner = FakeRunner(256, block_tokens=BLOCK, vocab_size=64)
    output = []
    while len(output) < params.max_tokens:
        tokens = (*prompt, *output)
        table = tuple(BlockId(index) for index in range(256))
        logits = runner.run(Batch(items=(batch_item(tokens, 0, table, sample=True),)))
        row = SamplingRow(
            params=params,
            choice=choice,
            position=len(tokens),
            prompt=prompt,
            output=output,
            eos_token_ids=runner.eos_token_ids,
        )
        output.append(sample(logits, [row])[0].token_id)
        is_eos = output[-1] in runner.eos_token_ids and not params.ignore_eos
        if len(output) >= params.min_tokens and (is_eos or output[-1] in params.stop_token_ids):
            break
    return output


@pytest.fixture(name="reference")
def reference_fixture():
    return reference


@pytest.fixture(name="prompt_of")
def prompt_of_fixture():
    return prompt_of


@pytest.fixture
def make_client():
    """Makes clients; at the end each closes what it opened, and then nothing may be leased."""
    clients = []

    def make(**options):
        clients.append(Client(**options))
        return clients[-1]

    yield make
    for client in clients:
        client.end()


@pytest.fixture
def whole_shape():
    return WholeShape()
