import threading
import time

import pytest

from headrace.clock import WallClock
from headrace.core.request import SamplingParams, SequenceId, SequenceSpec
from headrace.engine import thread as engine_thread
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import (
    Admitted,
    Begin,
    Close,
    Failed,
    Goal,
    HoldWriter,
    ListHolders,
    Open,
    Pin,
    Quarantine,
    Sampled,
)
from headrace.engine.scheduler import FirstComeFirstServed
from headrace.engine.thread import EngineThread
from headrace.errors import DeadlineExceeded, Draining, InternalError, Saturated
from headrace.techniques.sarathi.shape import ChunkedShape
from headrace.testing.runner import FakeRunner

PATIENCE_S = 20.0


class GatedRunner(FakeRunner):
    """Computes only while its gate is open."""

    def __init__(self):
        super().__init__(64, block_tokens=4, vocab_size=64)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def run(self, batch):
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        return super().run(batch)


class Reader:
    """Collects events on the engine's thread; tests wait for what they expect."""

    def __init__(self):
        self.events = []
        self._changed = threading.Condition()

    def __call__(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, kind, count=1):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= count, PATIENCE_S), self.events
        return self.of(kind)

    def comes(self, kind, seconds):
        with self._changed:
            return self._changed.wait_for(lambda: self.of(kind), seconds)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def runner():
    return GatedRunner()


@pytest.fixture
def engine(runner):
    return Engine(
        runner,
        EngineConfig(num_blocks=64, token_budget=32, max_running=8, fingerprint="m"),
        order=FirstComeFirstServed(),
        shape=ChunkedShape(),
        clock=WallClock(),
        on_cache_change=lambda change: None,
    )


def assert_ends_empty(engine):
    """Blocks that peers know of stay until Close, even at the end; then nothing is left."""
    for name in list(engine._sequences):
        engine.apply(Close(sequence_id=name))
    engine._cache.ledger.verify()
    assert (engine.stats().leased_blocks, engine.stats().num_leases) == (0, 0)


@pytest.fixture
def thread(engine, runner):
    thread = EngineThread(engine, WallClock())
    thread.start()
    yield thread
    runner.gate.set()
    thread.stop()
    assert not thread.is_alive
    assert_ends_empty(engine)


def open_sequence(thread, name="a", *, life_s=60.0, max_tokens=5):
    reader = Reader()
    spec = SequenceSpec(
        sequence_id=SequenceId(name),
        model="m",
        prompt=(3, 4, 5),
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        deadline_unix_ms=WallClock().unix_ms() + int(life_s * 1000),
    )
    thread.send(Open(spec=spec, goal=Goal.ANSWER, sink=reader))
    return reader


def begin(thread, name="a"):
    thread.send(Begin(sequence_id=SequenceId(name), num_present=0))


def poll(condition):
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it never became true"
        time.sleep(0.005)


def test_it_answers_from_its_own_thread(thread):
    reader = open_sequence(thread)
    reader.wait_for(Admitted)
    begin(thread)
    assert len(reader.wait_for(Sampled, 5)) == 5
    poll(lambda: thread.stats().leased_blocks == 0)
    assert thread.stats().num_steps > 0


def test_sending_does_not_wait_for_a_step(thread, runner):
    reader = open_sequence(thread)
    reader.wait_for(Admitted)
    runner.gate.clear()
    runner.entered.clear()
    begin(thread)
    assert runner.entered.wait(PATIENCE_S)
    other = open_sequence(thread, "b")
    assert other.events == []
    runner.gate.set()
    other.wait_for(Admitted)


def test_a_full_mailbox_refuses_work_and_takes_what_frees(thread, runner, monkeypatch):
    monkeypatch.setattr(engine_thread, "MAX_QUEUED_COMMANDS", 2)
    reader = open_sequence(thread, max_tokens=500)
    reader.wait_for(Admitted)
    runner.gate.clear()
    runner.entered.clear()
    begin(thread)
    assert runner.entered.wait(PATIENCE_S)
    poll(lambda: not thread._commands)
    waiting = [open_sequence(thread, f"w{index}") for index in range(2)]
    with pytest.raises(Saturated, match="mailbox"):
        open_sequence(thread, "too many")
    thread.send(Close(sequence_id=SequenceId("a")))
    runner.gate.set()
    for each in waiting:
        each.wait_for(Admitted)
    poll(lambda: thread.stats().num_running + thread.stats().num_waiting == 2)


def test_a_deadline_wakes_it(thread):
    reader = open_sequence(thread, life_s=0.2)
    reader.wait_for(Admitted)
    [failed] = reader.wait_for(Failed)
    assert isinstance(failed.error, DeadlineExceeded)


def test_a_deadline_beyond_all_clocks_is_no_trouble(thread):
    reader = open_sequence(thread, life_s=1e14)
    reader.wait_for(Admitted)
    # A wait that raises would fail the sequence as soon as the engine comes to rest.
    assert not reader.comes(Failed, 0.3)
    begin(thread)
    reader.wait_for(Sampled, 5)


@pytest.mark.parametrize("num_held", [0, 1], ids=["without sequences", "with one that waits"])
def test_idling_costs_no_time(thread, num_held):
    for _ in range(num_held):
        open_sequence(thread).wait_for(Admitted)
    poll(lambda: thread.stats().num_waiting == num_held)
    num_steps, begun_s = thread.stats().num_steps, time.process_time()
    threading.Event().wait(0.5)
    assert thread.stats().num_steps == num_steps
    assert time.process_time() - begun_s < 0.25


def test_stopping_fails_what_is_left_and_refuses_what_comes(engine, runner):
    thread = EngineThread(engine, WallClock())
    thread.start()
    reader = open_sequence(thread)
    reader.wait_for(Admitted)
    thread.stop()
    [failed] = reader.of(Failed)
    assert isinstance(failed.error, Draining)
    with pytest.raises(Draining):
        open_sequence(thread, "late")
    thread.send(Close(sequence_id=SequenceId("a")))


def test_what_was_queued_at_the_end_is_answered(engine, runner):
    thread = EngineThread(engine, WallClock())
    thread.start()
    reader = open_sequence(thread)
    reader.wait_for(Admitted)
    runner.gate.clear()
    runner.entered.clear()
    begin(thread)
    assert runner.entered.wait(PATIENCE_S)
    queued, pinned, quarantined, listed = open_sequence(thread, "b"), [], [], []
    thread.send(Pin(lease_id="p", block_hashes=(), deadline_s=1.0, reply=pinned.append))
    thread.send(Quarantine(block_hash=b"x" * 16, reply=quarantined.append))
    thread.send(ListHolders(reply=listed.append))
    stopper = threading.Thread(target=thread.stop)
    stopper.start()
    poll(lambda: thread._is_stopping)
    runner.gate.set()
    stopper.join(PATIENCE_S)
    assert isinstance(queued.of(Failed)[0].error, Draining)
    assert (pinned, quarantined, listed) == ([()], [False], [()])
    for question in (Quarantine(block_hash=b"x" * 16, reply=pinned.append), ListHolders(reply=pinned.append)):
        with pytest.raises(Draining):
            thread.send(question)


def test_a_bug_in_the_engine_fails_everyone_and_is_logged(engine, caplog, monkeypatch):
    thread = EngineThread(engine, WallClock())
    thread.start()
    reader = open_sequence(thread)
    reader.wait_for(Admitted)

    def broken():
        raise KeyError("lost")

    monkeypatch.setattr(engine, "step", broken)
    begin(thread)
    [failed] = reader.wait_for(Failed)
    assert isinstance(failed.error, InternalError)
    poll(lambda: not thread.is_alive)
    assert "engine stopped" in caplog.messages
    with pytest.raises(Draining):
        open_sequence(thread, "late")


def test_a_command_that_makes_no_sense_does_not_end_it(thread, caplog):
    thread.send(HoldWriter(writer_id="w", block_ids=(0,)))
    open_sequence(thread).wait_for(Admitted)
    assert "command refused" in caplog.messages
