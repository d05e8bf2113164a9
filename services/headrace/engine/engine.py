"""The engine: plan, run, commit."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from headrace.clock import Clock
from headrace.core.block import root_hash
from headrace.core.plan import SchedulerView, SequenceView, StepPlan, WorkItem
from headrace.core.request import FinishReason, SequenceId, Token
from headrace.engine.batch import Batch, BatchItem, Runner
from headrace.engine.cache import BlockCache
from headrace.engine.messages import (
    Admitted,
    Begin,
    CacheChange,
    Close,
    EngineCommand,
    EngineStats,
    Failed,
    Goal,
    HoldWriter,
    Open,
    Pin,
    Progress,
    ReleaseWriter,
    Sampled,
    Unpin,
)
from headrace.engine.sampler import Chosen, SamplingRow, sample
from headrace.engine.scheduler import plan_step
from headrace.engine.sequence import Sequence, State
from headrace.errors import DeadlineExceeded, HeadraceError, InternalError, InvalidRequest
from headrace.seams.order import OrderPolicy
from headrace.seams.shape import ShapePolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of an engine.

    Attributes:
        num_blocks: Size of the pool.
        token_budget: Most tokens of one step.
        max_running: Most sequences that hold blocks.
        fingerprint: Digest of the model, under which blocks are hashed.
    """

    num_blocks: int
    token_budget: int
    max_running: int
    fingerprint: str


class Engine:
    """Owns sequences and blocks; every method is called from one thread.

    Args:
        runner: Computes batches.
        config: Bounds.
        order: Ranks sequences.
        shape: Cuts steps.
        clock: Ends sequences whose deadline passes.
        on_cache_change: Hears what came into and left the prefix cache; must only hand it over.
    """

    def __init__(  # noqa: PLR0913 the engine's parts
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        order: OrderPolicy,
        shape: ShapePolicy,
        clock: Clock,
        on_cache_change: Callable[[CacheChange], None],
    ) -> None:
        self._runner = runner
        self._config = config
        self._order = order
        self._shape = shape
        self._clock = clock
        self._on_cache_change = on_cache_change
        self._cache = BlockCache(config.num_blocks, runner.layout.block_tokens)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._arrivals = itertools.count()
        self._num_steps = 0
        self._num_preemptions = 0
        self._computed_tokens = 0
        self._busy_s = 0.0

    def stats(self) -> EngineStats:
        """Return the state now."""
        counts = self._cache.counts()
        live = [sequence for sequence in self._sequences.values() if sequence.state is not State.DONE]
        waiting = [sequence for sequence in live if sequence.state is not State.RUNNING]
        return EngineStats(
            num_running=len(self._sequences) - len(waiting),
            num_waiting=len(waiting),
            waiting_tokens=sum(len(sequence.tokens) - sequence.kv_length for sequence in live),
            total_blocks=counts.total,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            leased_blocks=counts.leased,
            num_leases=counts.num_leases,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            computed_tokens=self._computed_tokens,
            busy_s=self._busy_s,
        )

    def apply(self, command: EngineCommand) -> None:
        """Carry out one command between steps."""
        match command:
            case Open():
                self._open(command)
            case Begin():
                self._begin(command)
            case Close(sequence_id=sequence_id):
                self._drop(sequence_id)
            case Pin():
                self._pin(command)
            case Unpin(lease_id=lease_id):
                self._cache.ledger.release(lease_id)
            case HoldWriter(writer_id=writer_id, block_ids=blocks):
                self._cache.ledger.hold(writer_id, blocks)
            case ReleaseWriter(writer_id=writer_id):
                self._cache.ledger.release_writer(writer_id)

    def step(self) -> bool:
        """Plan, run and commit one step; False when there was nothing to do."""
        self._expire()
        plan = self._plan()
        if not (plan.items or plan.admit or plan.evict):
            self._announce()
            return False
        begun_s = self._clock.now()
        self._make_room(plan)
        logits = self._run(plan)
        if logits is not None:
            self._commit(plan, logits)
        self._num_steps += 1
        self._busy_s += self._clock.now() - begun_s
        self._announce()
        return True

    def next_deadline_s(self) -> float | None:
        """Return when `step` has something to expire, if nothing happens before."""
        deadlines = [sequence.deadline_s for sequence in self._sequences.values()]
        leases_s = self._cache.ledger.next_deadline_s()
        finite = [deadline for deadline in (*deadlines, leases_s) if deadline != float("inf")]
        return min(finite) if finite else None

    def fail_all(self, error: HeadraceError) -> None:
        """End every sequence; the engine is leaving."""
        for sequence_id in list(self._sequences):
            self._fail(self._sequences[sequence_id], error)

    def _open(self, command: Open) -> None:
        spec = command.spec
        sequence = Sequence(
            spec=spec,
            goal=command.goal,
            sink=command.sink,
            arrival=next(self._arrivals),
            deadline_s=self._clock.now() + (spec.deadline_unix_ms - self._clock.unix_ms()) / 1000,
            root=root_hash(self._config.fingerprint, spec.cache_salt),
            tokens=list(spec.tokens),
        )
        refusal = self._refusal(sequence)
        if refusal is not None:
            command.sink(Failed(sequence_id=spec.sequence_id, error=refusal))
            return
        self._sequences[spec.sequence_id] = sequence

    def _refusal(self, sequence: Sequence) -> HeadraceError | None:
        spec, layout = sequence.spec, self._runner.layout
        context = self._runner.max_context_tokens
        if spec.sequence_id in self._sequences:
            return InvalidRequest(f"sequence {spec.sequence_id} is open already", field="sequence_id")
        if not spec.prompt:
            return InvalidRequest("the prompt is empty: give at least one token", field="prompt")
        if max(spec.tokens) >= self._runner.vocab_size or min(spec.tokens) < 0:
            return InvalidRequest("a token id is not in the vocabulary", field="prompt")
        if len(spec.tokens) >= context:
            return InvalidRequest(
                f"{len(spec.tokens)} tokens leave no room for an answer", field="prompt", limit=f"{context} tokens"
            )
        needed = sequence.most_blocks(layout.block_tokens, context)
        if needed > self._config.num_blocks:
            return InvalidRequest(
                f"prompt and max_tokens need {needed} KV blocks, the worker has {self._config.num_blocks}",
                field="max_tokens",
                limit=f"{self._config.num_blocks * layout.block_tokens} tokens",
            )
        return None

    def _begin(self, command: Begin) -> None:
        sequence = self._sequences.get(command.sequence_id)
        if sequence is None or sequence.state is not State.HELD:
            return
        sequence.has_begun = True
        sequence.state = State.RUNNING
        sequence.place(command.num_present)
        self._cache.name_full_blocks(sequence)
        if command.first is not None:
            self._append(
                sequence,
                Chosen(
                    token_id=command.first.token_id,
                    logprob=command.first.logprob,
                    top_logprobs=command.first.top_logprobs,
                ),
            )

    def _pin(self, command: Pin) -> None:
        blocks = self._cache.ledger.match(command.block_hashes)
        if blocks:
            self._cache.ledger.lease(command.lease_id, 0, shared=blocks, owner="pin", deadline_s=command.deadline_s)
        command.reply(blocks)

    def _expire(self) -> None:
        now_s = self._clock.now()
        self._cache.ledger.expire(now_s)
        late = [sequence for sequence in self._sequences.values() if sequence.deadline_s <= now_s]
        for sequence in late:
            self._fail(sequence, DeadlineExceeded("the request's deadline passed in the engine"))

    def _plan(self) -> StepPlan:
        live = (sequence for sequence in self._sequences.values() if sequence.state is not State.DONE)
        view = SchedulerView(
            sequences=tuple(self._view(sequence) for sequence in live),
            num_available=self._cache.ledger.num_available,
            block_tokens=self._runner.layout.block_tokens,
            num_layers=self._runner.num_layers,
            token_budget=self._config.token_budget,
            max_running=self._config.max_running,
        )
        return plan_step(view, self._order, self._shape, self._clock.now())

    def _view(self, sequence: Sequence) -> SequenceView:
        is_running = sequence.state is State.RUNNING
        is_waiting = sequence.state is State.WAITING
        can_evict = is_running and sequence.goal is Goal.ANSWER
        return SequenceView(
            sequence_id=sequence.spec.sequence_id,
            arrival=sequence.arrival,
            num_tokens=len(sequence.tokens),
            num_computed=sequence.kv_length,
            num_blocks=len(sequence.blocks),
            num_blocks_to_admit=self._cache.admission_cost(sequence) if is_waiting else 0,
            num_exclusive_blocks=self._cache.num_exclusive(sequence) if can_evict else 0,
            is_running=is_running,
            is_held=sequence.state is State.HELD,
            is_decoding=sequence.is_decoding,
            can_evict=can_evict,
            deadline_s=sequence.deadline_s,
        )

    def _make_room(self, plan: StepPlan) -> None:
        """Evict, grow and admit what the plan says; by construction nothing here runs out of blocks."""
        for sequence_id in plan.evict:
            sequence = self._sequences[sequence_id]
            self._cache.release(sequence)
            sequence.lose_blocks()
            self._num_preemptions += 1
        for item in plan.items:
            self._cache.grow(self._sequences[item.sequence_id], item.tokens[1])
        for sequence_id in plan.admit:
            self._admit(self._sequences[sequence_id])

    def _admit(self, sequence: Sequence) -> None:
        self._cache.admit(sequence)
        if sequence.has_begun:
            sequence.state = State.RUNNING
            return
        sequence.state = State.HELD
        sequence.sink(
            Admitted(
                sequence_id=sequence.spec.sequence_id,
                block_ids=tuple(sequence.blocks),
                num_cached_tokens=sequence.kv_length,
                block_hashes=tuple(sequence.hashes),
            )
        )

    def _run(self, plan: StepPlan) -> torch.Tensor | None:
        """Compute the plan's items; None when there are none or the runner failed."""
        if not plan.items:
            return None
        try:
            return self._runner.run(Batch(items=tuple(self._batch_item(item) for item in plan.items)))
        except Exception:  # noqa: BLE001 a bug in one step must not take the other sequences along
            logger.exception("step failed", extra={"num_items": len(plan.items), "num_tokens": plan.num_tokens})
            for item in plan.items:
                error = InternalError("the engine failed on this step; its log has the cause")
                self._fail(self._sequences[item.sequence_id], error)
            return None

    def _batch_item(self, item: WorkItem) -> BatchItem:
        sequence = self._sequences[item.sequence_id]
        start, end = item.tokens
        position = sequence.next_position
        return BatchItem(
            token_ids=tuple(sequence.tokens[start:end]),
            positions=tuple(range(position, position + end - start)),
            kv_start=start,
            block_table=tuple(sequence.blocks),
            sample=item.sample,
        )

    def _commit(self, plan: StepPlan, logits: torch.Tensor) -> None:
        sampling: list[Sequence] = []
        for item in plan.items:
            sequence = self._sequences[item.sequence_id]
            was_prompt = not sequence.is_decoding
            sequence.kv_length += item.num_tokens
            sequence.next_position += item.num_tokens
            self._computed_tokens += item.num_tokens
            self._cache.name_full_blocks(sequence)
            if was_prompt:
                sequence.sink(Progress(sequence_id=item.sequence_id, num_computed=sequence.kv_length))
            if item.sample:
                sampling.append(sequence)
        for sequence, chosen in zip(sampling, sample(logits, self._rows(sampling)), strict=True):
            self._append(sequence, chosen)

    def _rows(self, sequences: Iterable[Sequence]) -> list[SamplingRow]:
        eos = frozenset(self._runner.eos_token_ids)
        return [
            SamplingRow(
                params=sequence.spec.sampling,
                choice=sequence.spec.choice,
                position=sequence.next_position,
                prompt=sequence.spec.prompt,
                output=sequence.tokens[len(sequence.spec.prompt) :],
                eos_token_ids=eos,
            )
            for sequence in sequences
        ]

    def _append(self, sequence: Sequence, chosen: Chosen) -> None:
        """Take a chosen token into the sequence, tell of it, and end the sequence if it was the last."""
        cursor = sequence.num_output
        sequence.tokens.append(chosen.token_id)
        eos = frozenset(self._runner.eos_token_ids)
        finish = sequence.finish_reason(chosen.token_id, eos, self._runner.max_context_tokens)
        if sequence.goal is Goal.FIRST_TOKEN:
            # The receiver decides about the end; it sees the same token and the same limits.
            finish, sequence.state = None, State.DONE
        sequence.sink(Sampled(sequence_id=sequence.spec.sequence_id, token=_token(cursor, chosen, finish)))
        if finish is not None:
            self._drop(sequence.spec.sequence_id)

    def _fail(self, sequence: Sequence, error: HeadraceError) -> None:
        self._drop(sequence.spec.sequence_id)
        sequence.sink(Failed(sequence_id=sequence.spec.sequence_id, error=dataclasses.replace(error)))

    def _drop(self, sequence_id: SequenceId) -> None:
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._cache.release(sequence)

    def _announce(self) -> None:
        change = self._cache.take_change()
        if change is not None:
            self._on_cache_change(change)


def _token(cursor: int, chosen: Chosen, finish: FinishReason | None) -> Token:
    return Token(
        cursor=cursor,
        token_id=chosen.token_id,
        logprob=chosen.logprob,
        top_logprobs=chosen.top_logprobs,
        finish=finish,
    )
