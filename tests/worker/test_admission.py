"""What a prompt without a chance costs a cluster: one typed answer, no step, no block."""

from dataclasses import replace

import pytest

from headrace.core.cost import CostModel
from headrace.errors import DeadlineExceeded
from headrace.testing.fleet import open_fleet
from headrace.worker.config import WorkerRole

COST = CostModel(step_s=0.0, prompt_s=0.0, token_s=0.5, pair_s=0.0, decode_s=0.0, context_s=0.0)
PROMPT = range(10, 50)
CERTAIN_S = COST.least_prefill_s(len(PROMPT))
APART = {"p0": WorkerRole.PREFILL, "d0": WorkerRole.DECODE}
HYBRID = {"h0": WorkerRole.HYBRID}


def set_costs(fleet):
    for worker in fleet.workers.values():
        engine = worker.thread._engine
        engine._config = replace(engine._config, cost=COST)


@pytest.mark.parametrize("roles", [APART, HYBRID], ids=["apart", "hybrid"])
async def test_a_prompt_that_cannot_be_done_in_time_is_refused_at_once_and_by_nobody_twice(tmp_path, roles):
    async with open_fleet(tmp_path, roles) as fleet:
        set_costs(fleet)
        begun_s = fleet.clock.now()
        with pytest.raises(DeadlineExceeded, match="40 prompt tokens take 10.00 s at least"):
            await fleet.tokens(fleet.spec(PROMPT, timeout_s=0.8 * CERTAIN_S))
        assert fleet.clock.now() - begun_s < 0.5 * CERTAIN_S
        await fleet.at_rest()
        assert [worker.runner.batches for worker in fleet.workers.values()] == [[] for _ in roles]


@pytest.mark.parametrize("roles", [APART, HYBRID], ids=["apart", "hybrid"])
async def test_one_that_may_be_done_in_time_is_answered(tmp_path, roles):
    async with open_fleet(tmp_path, roles) as fleet:
        set_costs(fleet)
        assert len(await fleet.tokens(fleet.spec(PROMPT, timeout_s=2 * CERTAIN_S))) == 8
        await fleet.at_rest()
