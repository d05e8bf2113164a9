"""What counts as a mistake of the index, through real servicers, engines and gRPC."""

import pytest

from headrace.core.cost import CostModel
from headrace.core.placement import Tier
from headrace.index.events import Change, ChangeKind, Event
from headrace.testing.fleet import open_fleet

FAST = CostModel(step_s=0.0, prompt_s=0.0, token_s=1e-7, pair_s=0.0, decode_s=0.1, context_s=0.0, r2=1.0)


def promise(fleet, holder, prompt):
    """Let the index say that a worker holds a prompt's blocks."""
    hashes = fleet.workers[holder].blocks.hashes(prompt, b"")
    change = Change(kind=ChangeKind.STORED, tier=Tier.DEVICE, hashes=hashes)
    fleet.index.apply(Event(location=holder, epoch="e", sequence=0, changes=(change,)))


def keep_busy(fleet, *names):
    """Make the router believe that workers have much to do, for good."""
    for name in names:
        fleet.table.reserve(name, "other", 10_000)
    fleet.table._note = lambda member, load: None


@pytest.mark.parametrize(("workers", "busy", "chosen"), [("p0 p1 d0", "p1", "p0"), ("h0 h1", "h1", "h0")])
async def test_what_a_worker_declines_to_fetch_is_no_mistake_of_the_index(
    tmp_path, roles, prompt_of, workers, busy, chosen
):
    async with open_fleet(tmp_path, roles(workers), kvstore=True, cost=FAST) as fleet:
        promise(fleet, busy, prompt_of(1, 18))
        keep_busy(fleet, busy)
        await fleet.tokens(fleet.spec(prompt_of(1, 18)))
        assert fleet.workers[chosen].blocks.reuse().declined_tokens == 16
        assert (fleet.parts.drift.share, fleet.parts.drift.predicted_tokens) == (0.0, 0)


async def test_a_promise_that_nobody_keeps_counts_only_while_the_log_is_followed(tmp_path, roles, prompt_of):
    async with open_fleet(tmp_path, roles("h0"), kvstore=True) as fleet:
        for is_current, seed, predicted in ((False, 1, 0), (True, 2, 16)):
            fleet.parts.prefixes.is_current = lambda is_current=is_current: is_current
            fleet.index.forget("h0")
            promise(fleet, "h0", prompt_of(seed, 18))
            await fleet.tokens(fleet.spec(prompt_of(seed, 18)))
            assert (fleet.parts.drift.predicted_tokens, fleet.parts.drift.actual_tokens) == (predicted, 0)
        assert fleet.parts.drift.share == 1.0
