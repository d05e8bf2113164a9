"""A client may leave at any point of the protocol: both sides end with nothing held, and serve on."""

import asyncio

import pytest

from headrace.errors import DeadlineExceeded
from headrace.testing.fleet import BLOCK_TOKENS, open_fleet

NUM_TOKENS = 4


class Trip:
    """Cancels a task at the n-th step of the protocol, some passes of the loop later."""

    def __init__(self, fleet, at, passes):
        self._loop = asyncio.get_running_loop()
        self._left, self._passes = at, passes
        self.task = None
        self.seen = []
        fleet.on_tick = self

    def __call__(self, tick):
        self.seen.append(tick)
        self._left -= 1
        if self._left == 0:
            self._loop.call_soon_threadsafe(self._wait, self._passes)

    def _wait(self, passes):
        if passes:
            self._loop.call_soon(self._wait, passes - 1)
        else:
            self.task.cancel()


async def leave_everywhere(fleet, prompt_at, step):
    """Cancel at every step until a request ends before it is cancelled; returns how many were cancelled."""
    num_cancelled, at = 0, 1
    while True:
        for passes in (0, 1, 3, 10):
            spec = fleet.spec(prompt_at(at * 10 + passes), max_tokens=NUM_TOKENS)
            trip = Trip(fleet, at, passes)
            trip.task = asyncio.ensure_future(fleet.tokens(spec))
            try:
                await trip.task
            except asyncio.CancelledError:
                num_cancelled += 1
            fleet.on_tick = lambda _: None
            try:
                await fleet.at_rest()
            except AssertionError as error:
                raise AssertionError(f"left {passes} passes after step {at} of {trip.seen}: {error}") from None
        if not trip.task.cancelled() and len(trip.seen) < at:
            return num_cancelled
        at += step


@pytest.mark.parametrize(("workers", "step"), [("p0 d0", 1), ("h0", 1), ("p0 p1 d0 d1", 3)])
async def test_a_client_may_leave_at_every_step_and_nothing_is_held(tmp_path, roles, prompt_of, workers, step):
    async with open_fleet(tmp_path, roles(workers)) as fleet:
        answer = await fleet.tokens(fleet.spec(prompt_of(0, 18)))
        # Another prompt each time, or caches would shorten the path.
        num_cancelled = await leave_everywhere(fleet, lambda index: prompt_of(index, 18), step)
        assert num_cancelled > 20 / step
        assert await fleet.tokens(fleet.spec(prompt_of(0, 18))) == answer


async def test_a_client_may_leave_while_blocks_are_fetched_and_nothing_is_held(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0"), kvstore=True) as fleet:
        prefill = fleet.workers["p0"]
        spec = fleet.spec(prompt_of(1, 18), max_tokens=NUM_TOKENS)
        answer = await fleet.tokens(spec)
        prefill.blocks.store_later(spec, prefill.blocks.hashes(prompt_of(1, 18), b""))
        storing = asyncio.ensure_future(prefill.blocks.run_stores())
        await fleet.until(lambda: prefill.blocks.reuse().num_stored_blocks == 4, "not stored")
        storing.cancel()
        await asyncio.wait([storing])

        def forgotten(_):
            for worker in fleet.workers.values():
                worker.thread._engine._cache.ledger.forget_cached()
            return prompt_of(1, 18)

        await leave_everywhere(fleet, forgotten, 2)
        assert sum(prefill.blocks.reuse().fetched_tokens.values()) > 4 * 10 * BLOCK_TOKENS
        assert await fleet.tokens(fleet.spec(forgotten(0), max_tokens=NUM_TOKENS)) == answer


@pytest.mark.parametrize("timeout_ms", range(1, 60, 3))
async def test_a_deadline_may_pass_at_any_time_and_nothing_is_held(tmp_path, roles, prompt_of, timeout_ms):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        specs = [fleet.spec(prompt_of(seed, 30), timeout_s=timeout_ms / 1000, max_tokens=30) for seed in range(3)]
        ends = await asyncio.gather(*map(fleet.tokens, specs), return_exceptions=True)
        assert all(isinstance(end, DeadlineExceeded) or len(end) == 30 for end in ends), ends
        await fleet.at_rest()


async def test_many_clients_that_leave_at_once_free_everything(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0 d1"), num_blocks=40) as fleet:
        held = fleet.hold_at("p0 Progress", 5)
        asking = [asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(seed, 30)))) for seed in range(20)]
        await held.wait()
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        fleet.workers["p0"].runner.gate.set()
        await fleet.at_rest()


async def test_a_client_that_leaves_stops_prefill_within_a_chunk(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("p0 d0")) as fleet:
        held = fleet.hold_at("p0 Progress", 2)
        asking = asyncio.ensure_future(fleet.tokens(fleet.spec(prompt_of(1, 200))))
        await held.wait()
        asking.cancel()
        await asyncio.wait([asking])
        await fleet.until(lambda: not fleet.workers["p0"].server.num_running, "the prefill call goes on")
        runner = fleet.workers["p0"].runner
        num_steps = len(runner.batches)
        runner.gate.set()
        await fleet.at_rest()
        assert len(runner.batches) <= num_steps + 1
