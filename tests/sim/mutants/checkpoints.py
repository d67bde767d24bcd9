"""Of checkpoints, the replay window, and order."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import ExitStack
from typing import Any

from milvus_cdc.errors import RetryableError
from milvus_cdc.order import lane as lanes
from milvus_cdc_controller import loop, specs, wire
from milvus_cdc_controller.core import effects
from milvus_cdc_controller.store.records import encode
from milvus_cdc_replicator import convert, reader
from milvus_cdc_replicator.core import assignment, sequencer
from milvus_cdc_replicator.core.ops import WriteKind

from tests.sim.mutants import mutant, put

# The checkpoint.


@mutant("the checkpoint says a tick more than is durable")
def checkpoint_one_too_far(stack: ExitStack) -> None:
    advance = lanes.Lane._advance

    def too_far(self: Any) -> None:
        advance(self)
        if self._batches:
            self.resolved_ts = self._batches[0].ts

    put(stack, lanes.Lane, "_advance", too_far)


@mutant("the checkpoint is derived from what was read")
def checkpoint_of_what_was_read(stack: ExitStack) -> None:
    tick = lanes.Lane.tick

    def newest(self: Any, ts: int, position: bytes) -> Any:
        return tick(self, max([ts, *(op.ts for op in self._buffer)]), position)

    put(stack, lanes.Lane, "tick", newest)


@mutant("reading begins behind `read_from`")
def read_from_exclusive(stack: ExitStack) -> None:
    subscribe = reader.PchannelHub.subscribe

    def behind(self: Any, subscription: Any) -> None:
        subscription.last_order += 1
        subscribe(self, subscription)

    put(stack, reader.PchannelHub, "subscribe", behind)


@mutant("`read_from` is the tick, whatever lies before it")
def read_from_is_the_tick(stack: ExitStack) -> None:
    push = lanes.Lane._push
    release = lanes.Lane._release

    def note(self: Any, ts: int, position: bytes) -> None:
        self.tick_position = position
        release(self, ts, position)

    def at_tick(self: Any, batch: Any) -> None:
        batch.read_from = self.tick_position
        push(self, batch)

    put(stack, lanes.Lane, "_release", note)
    put(stack, lanes.Lane, "_push", at_tick)


# The horizon and the replay window.


@mutant("a new owner is told the checkpoint for the horizon")
def horizon_not_handed_over(stack: ExitStack) -> None:
    tell = specs.collection_spec

    def forgetful(record: Any, progress: Any) -> Any:
        spec = tell(record, progress)
        for shard in spec.vchannels:
            shard.horizon_ts = shard.resolved_ts
        return spec

    put(stack, wire, "collection_spec", forgetful)


@mutant("rows of the replay window are inserted")
def insert_in_the_replay_window(stack: ExitStack) -> None:
    kind = assignment.AssignmentCore._kind

    def inserted(self: Any, lane: Any, op: Any) -> WriteKind:
        found = kind(self, lane, op)
        return WriteKind.INSERT if found is WriteKind.UPSERT and not op.replaces else found

    put(stack, assignment.AssignmentCore, "_kind", inserted)


@mutant("the replay window ends with the checkpoint")
def replay_window_forgotten(stack: ExitStack) -> None:
    opened = assignment.AssignmentCore.mark_opened

    def forgotten(self: Any, existing_rows_until_ts: int) -> None:
        opened(self, existing_rows_until_ts)
        for lane in self.lanes.values():
            lane.upsert_until_ts = lane.resolved_ts

    put(stack, assignment.AssignmentCore, "mark_opened", forgotten)


@mutant("an insert with unknown outcome is repeated as an insert")
def unknown_outcome_inserted_again(stack: ExitStack) -> None:
    batch = convert.Converter.batch
    put(
        stack,
        convert.Converter,
        "batch",
        lambda self, write, *, as_upsert: batch(self, write, as_upsert=False),
    )


@mutant("a row beyond the horizon does not wait")
def horizon_not_awaited(stack: ExitStack) -> None:
    opened = assignment.AssignmentCore.mark_opened

    def boundless(self: Any, existing_rows_until_ts: int) -> None:
        opened(self, existing_rows_until_ts)
        for lane in self.lanes.values():
            lane.horizon_ts = 2**62

    put(stack, assignment.AssignmentCore, "mark_opened", boundless)


@mutant("the controller persists after it has sent (horizons, epochs)")
def persist_after_send(stack: ExitStack) -> None:
    async def reversed_order(self: Any) -> None:
        while True:
            await self._wake.wait()
            if not self._pending.urgent:
                await asyncio.sleep(loop.PROGRESS_WINDOW_SECONDS)
            self._wake.clear()
            batch, self._pending = self._pending, loop._Pending()
            for effect in batch.sends:
                self._let_out(effect)
            if batch.writes:
                await self._commit(
                    {
                        key: encode(e.record) if isinstance(e, effects.Save) else None
                        for key, e in batch.writes.items()
                    }
                )

    put(stack, loop.ControlLoop, "_store_and_send", reversed_order)


@mutant("what the store did not take is not stored again")
def store_failure_ignored(stack: ExitStack) -> None:
    async def once(self: Any, writes: Any) -> None:
        with contextlib.suppress(RetryableError):
            await self._store.commit(writes)

    put(stack, loop.ControlLoop, "_commit", once)


# Order.


@mutant("deletes come after the inserts of their timestamp")
def deletes_after_inserts(stack: ExitStack) -> None:
    put(stack, lanes, "_apply_order", lambda op: (op.ts, -op.rank, op.order))
    put(stack, lanes, "_pair_upserts", lambda due: due)


@mutant("requests that share keys do not wait for each other")
def keys_not_compared(stack: ExitStack) -> None:
    put(stack, sequencer.Sequencer, "_conflicts", lambda self, write: False)


@mutant("rows leave in the order of the log")
def log_order_kept(stack: ExitStack) -> None:
    put(stack, lanes, "_apply_order", lambda op: op.order)
