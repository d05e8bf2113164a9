"""The engine: plan, run, commit."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import assert_never

import torch

from headrace.clock import Clock
from headrace.core.block import BlockId, blocks_for, root_hash
from headrace.core.plan import StepPlan, WorkItem
from headrace.core.request import FinishReason, SequenceId, Token
from headrace.engine.batch import Batch, BatchItem, Runner
from headrace.engine.cache import BlockCache
from headrace.engine.config import EngineConfig
from headrace.engine.landing import Landing, NotLanded
from headrace.engine.leaving import Leaving
from headrace.engine.messages import (
    Admitted,
    Begin,
    CacheChange,
    Close,
    EngineCommand,
    EngineStats,
    Extended,
    Failed,
    Goal,
    HoldWriter,
    Keep,
    ListHolders,
    Open,
    Pin,
    Progress,
    Quarantine,
    ReleaseWriter,
    Report,
    Revise,
    Sampled,
    Settle,
    StartEarly,
    Unpin,
)
from headrace.engine.revisions import Revisions
from headrace.engine.sampler import Chosen, SamplingRow, sample
from headrace.engine.scheduler import RECOMPUTE_ALWAYS, plan_step
from headrace.engine.sequence import Sequence, State
from headrace.engine.swap import HostSwap
from headrace.engine.views import scheduler_view
from headrace.errors import DeadlineExceeded, HeadraceError, InternalError, InvalidRequest, Saturated
from headrace.seams.order import OrderPolicy
from headrace.seams.preempt import PreemptPolicy
from headrace.seams.shape import ShapePolicy

logger = logging.getLogger(__name__)


class Engine:
    """Owns sequences and blocks; every method is called from one thread.

    Args:
        runner: Computes batches.
        config: Bounds.
        order: Ranks sequences.
        shape: Cuts steps.
        clock: Ends sequences whose deadline passes.
        on_cache_change: Hears what came into and left the prefix cache; must only hand it over.
        preempt: Chooses whose KV is kept in host memory.
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
        preempt: PreemptPolicy = RECOMPUTE_ALWAYS,
    ) -> None:
        self._runner = runner
        self._config = config
        self._order = order
        self._shape = shape
        self._clock = clock
        self._on_cache_change = on_cache_change
        self._cache = BlockCache(
            config.num_blocks, runner.layout.block_tokens, describes_stored=config.describes_stored
        )
        # An answer that would fill the pool alone could never go on, as one that fills the context.
        self._max_tokens = min(runner.max_context_tokens, config.num_blocks * runner.layout.block_tokens)
        self._preempt = preempt
        self._swap = HostSwap(runner, config.num_swap_blocks, config.num_blocks, clock)
        self._revisions = Revisions(self._cache, self._swap, self._max_tokens, runner.vocab_size)
        self._leaving = Leaving(self._cache, clock)
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
            waiting_tokens=sum(sequence.num_computable - sequence.kv_length for sequence in live),
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
        """Carry out one command between steps; one that contradicts the ledger is logged and changes nothing."""
        try:
            self._apply(command)
        except ValueError:
            logger.exception("command refused", extra={"command": type(command).__name__})

    def _apply(self, command: EngineCommand) -> None:
        match command:
            case Open():
                self._open(command)
            case Revise():
                self._revise(command)
            case Settle() | Report():
                self._note_reader(command)
            case Begin():
                self._begin(command)
            case StartEarly():
                self._start_early(command)
            case Keep():
                self._keep(command)
            case Close(sequence_id=sequence_id):
                self._drop(sequence_id)
            case _:
                self._apply_to_ledger(command)

    def _apply_to_ledger(self, command: Pin | Unpin | HoldWriter | ReleaseWriter | Quarantine | ListHolders) -> None:
        match command:
            case Pin():
                self._pin(command)
            case Unpin(lease_id=lease_id):
                self._cache.ledger.release(_pin_lease(lease_id))
            case HoldWriter(writer_id=writer_id, block_ids=blocks):
                self._cache.ledger.hold(writer_id, blocks)
            case ReleaseWriter(writer_id=writer_id):
                self._cache.ledger.release_writer(writer_id)
            case Quarantine(block_hash=block_hash, reply=reply):
                reply(self._cache.ledger.unname(block_hash))
            case ListHolders(reply=reply):
                reply(self._cache.ledger.holders())
            case _:
                assert_never(command)

    def step(self) -> bool:
        """Plan, run and commit one step; False when there was nothing to do.

        Raises:
            InternalError: blocks were lost or counted twice; the engine must not go on.
        """
        self._expire()
        self._take_revisions()
        plan = self._plan()
        has_work = bool(plan.items or plan.admit or plan.extend or plan.evict)
        if has_work:
            begun_s = self._clock.now()
            self._make_room(plan)
            self._run(plan)
            self._num_steps += 1
            self._busy_s += self._clock.now() - begun_s
        self._cache.ledger.check()
        self._announce()
        return has_work

    def next_deadline_s(self) -> float | None:
        """Return when `step` has something to expire, if nothing happens before."""
        deadlines = [sequence.deadline_s for sequence in self._sequences.values() if not sequence.has_failed]
        leases_s = self._cache.ledger.next_deadline_s()
        finite = [deadline for deadline in (*deadlines, *self._changes_of_rank(), leases_s) if deadline != float("inf")]
        return min(finite) if finite else None

    def _changes_of_rank(self) -> list[float]:
        """Return when somebody who waits may get what others have now, though nothing else happens."""
        if all(each.state is not State.WAITING for each in self._sequences.values()):
            return []
        now_s = self._clock.now()
        ends = [each.revised_s + self._config.stall_s for each in self._sequences.values() if each.is_open]
        return [end for end in (*ends, self._leaving.next_end_s()) if end > now_s]

    def fail_all(self, error: HeadraceError) -> None:
        """End every sequence; the engine is leaving."""
        for sequence in list(self._sequences.values()):
            if not sequence.has_failed:
                self._fail(sequence, error)

    def _open(self, command: Open) -> None:
        spec = command.spec
        sequence = Sequence(
            spec=spec,
            goal=command.goal,
            sink=command.sink,
            arrival=next(self._arrivals),
            deadline_s=self._clock.now() + (spec.deadline_unix_ms - self._clock.unix_ms()) / 1000,
            root=root_hash(self._config.fingerprint, spec.cache_key),
            arrives_whole=command.arrives_whole,
            tokens=list(spec.tokens),
            is_streamed=command.is_open,
            is_open=command.is_open,
            num_final=command.num_final,
            revised_s=self._clock.now(),
        )
        refusal = self._refusal(sequence)
        if refusal is not None:
            command.sink(Failed(sequence_id=spec.sequence_id, error=refusal))
            return
        self._sequences[spec.sequence_id] = sequence

    def _refusal(self, sequence: Sequence) -> HeadraceError | None:
        spec, vocab_size = sequence.spec, self._runner.vocab_size
        if sequence.is_open and spec.output:
            return InvalidRequest("an answer that has begun goes on after a prompt that is complete", field="output")
        if spec.sequence_id in self._sequences:
            return InvalidRequest(f"sequence {spec.sequence_id} is open already", field="sequence_id")
        if not spec.prompt and not sequence.is_open:
            return InvalidRequest("the prompt is empty: give at least one token", field="prompt")
        if refusal := self._revisions.refusal(spec.tokens, "prompt"):
            return refusal
        if spec.sampling.max_tokens <= len(spec.output):
            return InvalidRequest(
                f"{len(spec.output)} of at most {spec.sampling.max_tokens} tokens are generated already",
                field="max_tokens",
                limit=f"more than {len(spec.output)}",
            )
        ids = {
            "stop_token_ids": spec.sampling.stop_token_ids,
            "logit_bias": [token for token, _ in spec.sampling.logit_bias],
        }
        for field, tokens in ids.items():
            if not all(0 <= token < vocab_size for token in tokens):
                limit = f"{vocab_size} tokens"
                return InvalidRequest(f"a token id in {field} is not in the vocabulary", field=field, limit=limit)
        return None

    def _revise(self, command: Revise) -> None:
        sequence = self._sequences.get(command.sequence_id)
        if sequence is None or sequence.has_failed:
            return
        sequence.pending.append(command.revision)
        sequence.revised_s = self._clock.now()

    def _take_revisions(self) -> None:
        """Carry out the revisions of sequences into whose blocks nothing is being fetched."""
        for sequence in [each for each in self._sequences.values() if each.pending and not each.has_failed]:
            refusal = self._revisions.take(sequence)
            if refusal is not None:
                self._fail(sequence, refusal)
            else:
                self._report_idle(sequence)

    def _note_reader(self, command: Settle | Report) -> None:
        sequence = self._sequences.get(command.sequence_id)
        if sequence is None:
            return
        if isinstance(command, Settle):
            self._revisions.settle(sequence, command.num_progress)
        elif sequence.has_begun and sequence.kv_length:
            self._report(sequence)

    def _begin(self, command: Begin) -> None:
        sequence = self._sequences.get(command.sequence_id)
        if sequence is None or sequence.state is not State.HELD:
            return
        num_known, present = len(sequence.tokens), command.num_present
        if sequence.is_open and sequence.arrives_whole:
            self._fail(sequence, InternalError("begin says that all KV has come, and the prompt is still open"))
            return
        if sequence.is_open:
            sequence.start(min(max(present, sequence.kv_length), sequence.num_computable))
            self._cache.name_full_blocks(sequence)
            self._report_idle(sequence)
            return
        if not 0 <= present <= num_known or (present == num_known and command.first is None):
            error = InternalError(f"begin says {present} of {num_known} tokens are present: nothing is left to sample")
            self._fail(sequence, error)
            return
        if command.first is not None and not 0 <= command.first.token_id < self._runner.vocab_size:
            self._fail(sequence, InternalError("begin's first token is not in the vocabulary"))
            return
        if sequence.is_extending or blocks_for(present, self._cache.block_tokens) > len(sequence.blocks):
            self._fail(sequence, InternalError(f"begin says {present} tokens are present, more than it has blocks for"))
            return
        self._cache.trim(sequence)
        # The local cache may hold more than the caller counts; its blocks are shared and not written again.
        sequence.start(max(present, sequence.kv_length))
        self._cache.name_full_blocks(sequence)
        if command.first is not None:
            first = command.first
            chosen = Chosen(token_id=first.token_id, logprob=first.logprob, top_logprobs=first.top_logprobs)
            self._append(sequence, chosen)

    def _start_early(self, command: StartEarly) -> None:
        sequence, num_present = self._sequences.get(command.sequence_id), command.landing.num_present
        if sequence is not None and sequence.state is State.HELD:
            if not sequence.kv_length <= num_present < len(sequence.tokens):
                raise ValueError(f"{num_present} of {len(sequence.tokens)} tokens land, {sequence.kv_length} are here")
            sequence.landing = command.landing

    def _keep(self, command: Keep) -> None:
        sequence = self._sequences.get(command.sequence_id)
        if sequence is not None and sequence.state is State.HELD:
            sequence.place(max(sequence.kv_length, min(command.num_present, len(sequence.tokens))))
            self._cache.name_full_blocks(sequence)

    def _pin(self, command: Pin) -> None:
        ledger, lease_id = self._cache.ledger, _pin_lease(command.lease_id)
        blocks = ledger.match(command.block_hashes) if ledger.find(lease_id) is None else ()
        if blocks:
            ledger.lease(
                lease_id,
                0,
                shared=blocks,
                owner=command.owner,
                reader=command.reader,
                epoch=command.epoch,
                deadline_s=command.deadline_s,
            )
        command.reply(blocks)

    def _expire(self) -> None:
        now_s = self._clock.now()
        self._cache.ledger.expire(now_s)
        late = [each for each in self._sequences.values() if each.deadline_s <= now_s and not each.has_failed]
        for sequence in late:
            self._fail(sequence, DeadlineExceeded("the request's deadline passed in the engine"))
        # What is present of a prompt is known once it runs; an answer that has begun goes on to its deadline.
        prompts = [each for each in self._sequences.values() if each.state is State.RUNNING and not each.num_output]
        for sequence in prompts:
            least_s, left_s = self._least_s(sequence), sequence.deadline_s - now_s
            if least_s > left_s:
                self._fail(sequence, _hopeless(sequence, least_s, left_s))

    def _least_s(self, sequence: Sequence) -> float:
        """Return seconds that the rest of a prompt takes for certain, even if nothing else runs."""
        cost, num_present = self._config.cost, sequence.kv_length
        return 0.0 if cost is None else cost.least_prefill_s(len(sequence.tokens) - num_present, num_present)

    def _plan(self) -> StepPlan:
        now_s = self._clock.now()
        view = scheduler_view(self._sequences.values(), self._cache, self._runner, self._config, now_s)
        view = dataclasses.replace(view, swap=self._swap.view(), num_leaving_blocks=self._leaving.num_blocks())
        return plan_step(view, self._order, self._shape, now_s, self._preempt)

    def _make_room(self, plan: StepPlan) -> None:
        """Evict, admit and grow what the plan says; by construction nothing here runs out of blocks."""
        for sequence_id in plan.evict:
            self._evict(self._sequences[sequence_id], is_saved=sequence_id in plan.save)
        admitted = [self._sequences[sequence_id] for sequence_id in plan.admit]
        for sequence in admitted:
            self._cache.share(sequence)
        for item in plan.items:
            self._cache.grow(self._sequences[item.sequence_id], item.tokens[1])
        for sequence in admitted:
            self._cache.grow(sequence, len(sequence.tokens))
            self._admit(sequence)
        for sequence in [self._sequences[sequence_id] for sequence_id in plan.extend]:
            self._cache.grow(sequence, len(sequence.tokens))
            sequence.is_extending = False
            blocks, version = tuple(sequence.blocks), sequence.version
            sequence.sink(Extended(sequence_id=sequence.spec.sequence_id, version=version, block_ids=blocks))

    def _evict(self, sequence: Sequence, *, is_saved: bool) -> None:
        self._num_preemptions += 1
        if sequence.state is State.HELD:
            self._leaving.note(sequence)
            error = Saturated("this worker needs the blocks that wait for the rest of a context", retry_after_s=1.0)
            self._fail(sequence, error)
            return
        if is_saved:
            blocks = sequence.blocks[: blocks_for(sequence.kv_length, self._cache.block_tokens)]
            sequence.saved = self._swap.save(blocks, sequence.kv_length)
        self._cache.release(sequence)
        sequence.lose_blocks()

    def _restore(self, sequence: Sequence) -> None:
        """Copy KV back that was kept when the sequence lost its blocks, behind what the cache had of it."""
        saved, sequence.saved = sequence.saved, None
        if saved is None:
            return
        if saved.num_tokens > sequence.kv_length:
            size = self._cache.block_tokens
            first = sequence.kv_length // size
            self._swap.load(saved, first, sequence.blocks[first : blocks_for(saved.num_tokens, size)])
            sequence.place(saved.num_tokens)
            self._cache.name_full_blocks(sequence)
        self._swap.drop(saved)

    def _admit(self, sequence: Sequence) -> None:
        if sequence.has_begun:
            sequence.state = State.RUNNING
            self._restore(sequence)
            self._report_idle(sequence)
            return
        sequence.state = State.HELD
        sequence.sink(
            Admitted(
                sequence_id=sequence.spec.sequence_id,
                block_ids=tuple(sequence.blocks),
                num_cached_tokens=sequence.kv_length,
                block_hashes=tuple(sequence.hashes),
                num_tokens=len(sequence.tokens),
                version=sequence.version,
            )
        )

    def _run(self, plan: StepPlan) -> None:
        """Compute the plan's items and commit them; whatever goes wrong fails these sequences and no others."""
        if not plan.items:
            return
        early = [each for item in plan.items if (each := self._sequences[item.sequence_id]).landing is not None]
        try:
            logits = self._compute(plan, [each.landing for each in early if each.landing is not None])
            sampling = [self._sequences[item.sequence_id] for item in plan.items if item.sample]
            chosen = sample(logits, self._rows(sampling))
        except NotLanded:
            # Nothing of the step counts; the others compute it again, these wait for their Begin.
            for sequence in early:
                sequence.landing = None
            return
        except Exception:
            logger.exception("step failed", extra={"num_items": len(plan.items), "num_tokens": plan.num_tokens})
            for item in plan.items:
                error = InternalError("the engine failed on this step; its log has the cause")
                self._fail(self._sequences[item.sequence_id], error)
            return
        self._commit(plan)
        for sequence, token in zip(sampling, chosen, strict=True):
            self._append(sequence, token)

    def _compute(self, plan: StepPlan, landings: list[Landing]) -> torch.Tensor:
        """Return the logits of a step whose KV all landed, and was what it should be."""

        def await_layer(layer: int) -> None:
            for landing in landings:
                landing.wait_layer(layer)

        items = tuple(self._batch_item(item) for item in plan.items)
        logits = self._runner.run(Batch(items=items, await_layer=await_layer if landings else None))
        for landing in landings:
            landing.wait_end()
        return logits

    def _batch_item(self, item: WorkItem) -> BatchItem:
        sequence = self._sequences[item.sequence_id]
        start, end = item.tokens
        position = sequence.next_position + start - sequence.kv_length
        return BatchItem(
            token_ids=tuple(sequence.tokens[start:end]),
            positions=tuple(range(position, position + end - start)),
            kv_start=start,
            block_table=tuple(sequence.blocks),
            sample=item.sample,
        )

    def _commit(self, plan: StepPlan) -> None:
        """Take note of the KV that the items have written."""
        for item in plan.items:
            sequence = self._sequences[item.sequence_id]
            if sequence.landing is not None:
                sequence.start(sequence.num_present)
            was_prompt = not sequence.is_decoding
            sequence.kv_length += item.num_tokens
            sequence.next_position += item.num_tokens
            self._computed_tokens += item.num_tokens
            self._cache.name_full_blocks(sequence)
            if was_prompt:
                self._report(sequence)

    def _report_idle(self, sequence: Sequence) -> None:
        """Tell how far an open prompt is that no step will tell of: all that is known of it is present."""
        if sequence.state is State.RUNNING and sequence.is_idle and sequence.kv_length:
            self._report(sequence)

    def _report(self, sequence: Sequence) -> None:
        """Tell how far a prompt is, and where, if its blocks were not all known at its admission."""
        blocks: tuple[BlockId, ...] = ()
        if sequence.is_streamed:
            blocks = tuple(sequence.blocks[: blocks_for(sequence.kv_length, self._cache.block_tokens)])
            sequence.num_unsettled += sequence.goal is Goal.FIRST_TOKEN
        sequence.sink(
            Progress(
                sequence_id=sequence.spec.sequence_id,
                num_computed=sequence.kv_length,
                version=sequence.version,
                block_ids=blocks,
            )
        )

    def _rows(self, sequences: Iterable[Sequence]) -> list[SamplingRow]:
        return [
            SamplingRow(
                params=sequence.spec.sampling,
                choice=sequence.spec.choice,
                # The token's place among the known ones: rows are made before the step is committed.
                position=len(sequence.tokens),
                prompt=sequence.spec.prompt,
                output=sequence.tokens[len(sequence.spec.prompt) :],
                eos_token_ids=self._runner.eos_token_ids,
            )
            for sequence in sequences
        ]

    def _append(self, sequence: Sequence, chosen: Chosen) -> None:
        """Take a chosen token into the sequence, tell of it, and end the sequence if it was the last."""
        cursor = sequence.num_output
        sequence.tokens.append(chosen.token_id)
        finish = sequence.finish_reason(chosen.token_id, self._runner.eos_token_ids, self._max_tokens)
        if sequence.goal is Goal.FIRST_TOKEN:
            # The receiver decides about the end; it sees the same token and the same limits.
            finish, sequence.state = None, State.DONE
        sequence.sink(Sampled(sequence_id=sequence.spec.sequence_id, token=_token(cursor, chosen, finish)))
        if finish is not None:
            self._drop(sequence.spec.sequence_id)

    def _fail(self, sequence: Sequence, error: HeadraceError) -> None:
        # Others were told of the blocks of a held or prefilled sequence and may be about to announce a
        # writer, or still read: these blocks stay until Close, which says that nobody will.
        if sequence.blocks and (sequence.state is not State.RUNNING or sequence.goal is Goal.FIRST_TOKEN):
            sequence.state, sequence.has_failed = State.DONE, True
        else:
            self._drop(sequence.spec.sequence_id)
        sequence.sink(Failed(sequence_id=sequence.spec.sequence_id, error=dataclasses.replace(error)))

    def _drop(self, sequence_id: SequenceId) -> None:
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._revisions.forget(sequence)
            self._cache.release(sequence)

    def _announce(self) -> None:
        change = self._cache.take_change()
        if change is not None:
            self._on_cache_change(change)


def _hopeless(sequence: Sequence, least_s: float, left_s: float) -> DeadlineExceeded:
    num_missing = len(sequence.tokens) - sequence.kv_length
    return DeadlineExceeded(
        f"{num_missing} prompt tokens take {least_s:.2f} s at least, {left_s:.2f} s are left: give a later deadline",
        field="deadline",
    )


def _pin_lease(lease_id: str) -> str:
    return f"pin {lease_id}"


def _token(cursor: int, chosen: Chosen, finish: FinishReason | None) -> Token:
    return Token(
        cursor=cursor,
        token_id=chosen.token_id,
        logprob=chosen.logprob,
        top_logprobs=chosen.top_logprobs,
        finish=finish,
    )
