"""Only a refused connection or another life proves that a process is gone; silence proves nothing."""

import pytest

from headrace.runtime.channels import Channels
from headrace.testing.fleet import open_fleet
from headrace.worker import lifetimes
from headrace.worker.config import WorkerRole
from headrace.worker.lifetimes import Lifetimes


class Watch:
    def __init__(self, fleet, channels):
        self.fleet, self.worker = fleet, fleet.workers["h0"]
        self.address, self.epoch = self.worker.lane.address, self.worker.epoch
        self.lifetimes = Lifetimes(channels, self.worker._parts.introduce)

    async def meet(self):
        return await self.lifetimes.meet(self.address, self.epoch)

    async def is_over(self):
        return await self.lifetimes.is_over(self.address, self.epoch)


@pytest.fixture
async def watch(tmp_path, monkeypatch):
    monkeypatch.setattr(lifetimes, "PROBE_TIMEOUT_S", 0.3)
    async with open_fleet(tmp_path, {"h0": WorkerRole.HYBRID}) as fleet, Channels() as channels:
        yield Watch(fleet, channels)


async def test_a_process_that_answers_is_not_gone(watch):
    assert await watch.meet()
    assert not await watch.is_over()


async def test_a_refused_connection_is_the_end(watch):
    await watch.meet()
    await watch.worker.kill()
    assert await watch.is_over()


@pytest.mark.parametrize("fingerprint", ["fake-model", "another model"])
async def test_another_life_at_the_address_is_the_end(watch, fingerprint):
    """One that serves another model does not even introduce itself."""
    await watch.meet()
    await watch.worker.kill()
    await watch.fleet.revive("h0", fingerprint=fingerprint)
    found = []

    async def ask():
        found.append(await watch.is_over())

    for _ in range(50):  # gRPC notices only after a failed call that the connection is gone.
        await ask()
        if found[-1]:
            break
    assert found[-1]


async def test_silence_is_not_the_end(watch):
    await watch.meet()
    watch.worker.lane.stall()
    assert not await watch.is_over()
    watch.worker.lane.resume()


async def test_a_refusal_where_the_process_was_never_met_proves_nothing(watch):
    """The address may be wrong, or lead to somebody else from here."""
    await watch.worker.kill()
    assert not await watch.meet()
    assert not await watch.is_over()
    assert not await watch.is_over()


async def test_a_life_that_somebody_else_met_counts_as_met(watch):
    watch.lifetimes.note(watch.address, watch.epoch)
    await watch.worker.kill()
    assert await watch.is_over()


async def test_a_process_that_could_not_be_met_at_first_is_met_later(watch):
    watch.worker.lane.stall()
    assert not await watch.meet()
    watch.worker.lane.resume()
    assert not await watch.is_over()
    await watch.worker.kill()
    assert await watch.is_over()


async def test_another_life_than_the_one_named_is_not_met(watch):
    assert not await watch.lifetimes.meet(watch.address, "a life before")
    assert not await watch.lifetimes.is_over(watch.address, "a life before")


@pytest.mark.parametrize("address", ["nowhere", "", "127.0.0.1:x", "[::1]:y"])
async def test_an_address_that_makes_no_sense_proves_nothing(watch, address):
    watch.lifetimes.note(address, "e1")
    assert not await watch.lifetimes.is_over(address, "e1")


async def test_the_memory_of_lifetimes_is_bounded(watch, monkeypatch):
    monkeypatch.setattr(lifetimes, "MAX_MET", 3)
    for number in range(5):
        watch.lifetimes.note(watch.address, f"e{number}")
    assert list(watch.lifetimes._met) == [(watch.address, f"e{number}") for number in (2, 3, 4)]
