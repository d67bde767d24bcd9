"""After an owner that was lost: counts at the sink the keys that it may still have been writing,
and says if they are as they should be.

Laws: counted is when such a request can no longer take effect, and everything that it can have
held is written anew. What owners in between have written is read again beside the rows, which wait
for none of it. What differs while rows go on is looked at again with none under way. What cannot be
counted is written once more; nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.model import ObjectState
from milvus_cdc.order.lane import Lane
from milvus_cdc.order.ops import Key
from milvus_cdc.sink import Copies, Sink

from milvus_cdc_replicator import metrics
from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.core.budget import Budget
from milvus_cdc_replicator.core.ops import Write
from milvus_cdc_replicator.core.past import Past
from milvus_cdc_replicator.core.tally import Tally
from milvus_cdc_replicator.gate import WriteGate
from milvus_cdc_replicator.halting import Halted, pause, unless_halted
from milvus_cdc_replicator.intake import Intake
from milvus_cdc_replicator.report import Recounted
from milvus_cdc_replicator.sink_object import SinkObject
from milvus_cdc_replicator.sink_work import look_again
from milvus_cdc_replicator.spec import CollectionAssignment, Recount

SETTLE_SECONDS = 30.0
"""After the take-over, which is a lease and its margin after the last write began: several times
the longest deadline of a write.
"""
CHUNK_KEYS = 8_192
STILL_SECONDS = 10.0
"""So long rows are held back at most until none is under way."""
TRIES = 8
TRY_AGAIN_SECONDS = 3.0
NAMED_KEYS = 5
NO_ROOM = "there are more of them than memory for it"


class _CannotTell(Exception):
    """Counting will not succeed here."""


@dataclass(slots=True)
class _Wrong:
    """Keys that are not at the sink as they should be."""

    doubled: int = 0
    gone: int = 0
    back: int = 0
    """Deleted, and there."""
    keys: list[Key] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.doubled or self.gone or self.back)

    def add(self, other: _Wrong) -> None:
        self.doubled += other.doubled
        self.gone += other.gone
        self.back += other.back
        self.keys = [*self.keys, *other.keys][:NAMED_KEYS]


class Recounting:
    """Of one assignment; nothing but `ended` where none is wanted."""

    def __init__(
        self,
        assignment: CollectionAssignment,
        core: AssignmentCore,
        placed: SinkObject,
        *,
        budget: Budget,
        gate: WriteGate,
        read: Callable[[Past], Intake],
        halt: asyncio.Event,
        named: bool,
        post: Callable[[Callable[[], None]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], None],
        log: Any,
    ) -> None:
        """`read` feeds what is read beside the core. `named`: rows name a partition. `post` hands
        an event to the owner of the core, `spawn` runs work beside it, `changed` makes the
        assignment report.
        """
        self._assignment = assignment
        self._core = core
        self._object = placed
        self._gate = gate
        self._read = read
        self._halt = halt
        self._post = post
        self._spawn = spawn
        self._changed = changed
        self._log = log
        self._sink: Sink | None = None
        self._settled_at = float("inf")
        self._counting = False
        self.ended = Recounted.NOT_YET
        self._again = assignment.recount is Recount.WRITE_AGAIN
        self._wanted = assignment.recount is not Recount.NONE
        self._past = self._past_of(assignment)
        self._past_intake: Intake | None = None
        self._past_opened = False
        if not self._wanted:
            return
        core.tally = Tally(budget.set_aside, named=named)
        if self._past is not None:
            core.tally.await_past()
        self._until = {
            lane.vchannel: max(lane.horizon_ts, lane.resolved_ts) for lane in assignment.lanes
        }

    def _past_of(self, assignment: CollectionAssignment) -> Past | None:
        lanes = [
            Lane(
                lane.vchannel,
                lane.pchannel,
                read_from=lane.recount_from,
                resolved_ts=lane.recount_ts,
                horizon_ts=lane.horizon_ts,
                closed=False,
            )
            for lane in assignment.lanes
            if lane.recount_from and not lane.closed and lane.recount_ts < lane.resolved_ts
        ]
        if not lanes:
            return None
        until_ts = {lane.vchannel: lane.resolved_ts for lane in assignment.lanes}
        return Past(lanes, until_ts, self._core.took_before)

    def begin(self, sink: Sink) -> None:
        """The sink's collection is opened."""
        if not self._wanted or not self._core.opened:
            return
        if not self._object.late_writes:
            self._end(Recounted.DONE)
            return
        self._sink = sink
        self._settled_at = time.monotonic() + (0.0 if self._again else SETTLE_SECONDS)

    def refused(self, write: Write) -> None:
        """Rows of it are dead letters, not at the sink."""
        if self._core.tally is not None:
            for op in write.refused:
                self._core.tally.forget(op.keys())

    def close(self) -> None:
        """Nothing is counted any more."""
        self.leave_past()
        if self._core.tally is not None:
            self._core.tally.clear()
            self._core.tally = None

    @property
    def waits(self) -> bool:
        """For its time, or that of the source."""
        return self._sink is not None and self.ended is Recounted.NOT_YET

    def act(self) -> None:
        """Begins when it is due."""
        if not self.waits or self._counting or self._halt.is_set():
            return
        self._read_past()
        if self._past is not None:
            return
        if time.monotonic() < self._settled_at or not self._window_closed():
            return
        if self._object.placed.state is ObjectState.DROPPED:
            return  # all of it goes
        self._counting = True
        self._spawn(self._count())

    def _window_closed(self) -> bool:
        return all(
            lane.closed or lane.resolved_ts >= self._until[lane.vchannel]
            for lane in self._core.lanes.values()
        )

    def _read_past(self) -> None:
        """Rows first: it begins when everything that may be there already is written anew."""
        past, tally = self._past, self._core.tally
        assert tally is not None
        if past is None:
            return
        if self._past_intake is None:
            if self._window_closed():
                self._past_intake = self._read(past)
                self._spawn(self._open_past(self._past_intake))
            return
        past.step()
        if self._past_opened and (past.over or tally.full):
            self.leave_past()
            tally.past_read()
        else:
            self._past_intake.relieve()
            self._past_intake.account()

    async def _open_past(self, intake: Intake) -> None:
        await intake.open()
        if self._past_intake is intake:
            self._past_opened = True
        else:
            intake.leave()

    def leave_past(self) -> None:
        """Nothing of it is read any more."""
        if self._past_intake is not None:
            self._past_intake.leave()
        self._past = self._past_intake = None

    async def _count(self) -> None:
        assert self._core.tally is not None
        tally = self._core.tally
        try:
            if tally.full:
                raise _CannotTell(NO_ROOM)
            keys, wrong = await self._look_at_all(tally)
        except Halted:
            return
        except _CannotTell as error:
            verdict = Recounted.DONE if self._again else Recounted.WRITE_AGAIN
            self._log.info(
                "keys that a lost replicator may have written cannot be counted",
                why=str(error),
                written_again=self._again,
            )
        else:
            verdict = self._judge(keys, wrong)
        self._post(lambda: self._end(verdict))

    def _judge(self, keys: int, wrong: _Wrong) -> Recounted:
        """Raises UserError when it is wrong for the second time."""
        if not wrong:
            self._log.info("keys recounted after the loss of a replicator", keys=keys)
            return Recounted.DONE
        found = {"doubled": wrong.doubled, "gone": wrong.gone, "back": wrong.back}
        self._log.warning(
            "keys are wrong at the sink after the loss of a replicator",
            **found,
            of=keys,
            some=wrong.keys,
            written_again=self._again,
        )
        name = self._object.placed.full_name
        for what, number in found.items():
            metrics.DOUBLED_KEYS.labels(self._assignment.task, name, what).inc(number)
        if not self._again:
            return Recounted.WRITE_AGAIN
        some = ", ".join(map(repr, wrong.keys))
        raise UserError(
            "DOUBLED_KEYS",
            f"of {name} at the sink {wrong.doubled} rows are doubled, {wrong.gone} are gone and "
            f"{wrong.back} are back that were deleted (for example {some}), though everything "
            "since the loss of a replicator was written again: does somebody else write there? "
            "`milvus-cdc task retry` writes it once more, `task resync` fills the collection anew",
        )

    def _end(self, verdict: Recounted) -> None:
        self.ended = verdict
        self.close()
        self._changed()

    # ---- looking

    async def _look_at_all(self, tally: Tally) -> tuple[int, _Wrong]:
        """How many keys, and what is wrong of them. Raises Halted, _CannotTell."""
        looked, wrong = 0, _Wrong()
        for partition, keys in tally.chunks(CHUNK_KEYS):
            looked += len(keys)
            if await self._patiently(lambda: self._compare(tally, partition, keys)):  # noqa: B023
                found = await self._patiently(
                    lambda: self._compare_still(tally, partition, keys)  # noqa: B023
                )
                if found.doubled and not (found.gone or found.back):
                    found.keys = await self._doubled_key(partition, found.keys)
                wrong.add(found)
        if tally.full:
            raise _CannotTell(NO_ROOM)
        return looked, wrong

    async def _patiently(self, call: Callable[[], Coroutine[Any, Any, _Wrong]]) -> _Wrong:
        for attempt in range(TRIES):
            try:
                async with self._gate.comparing(self._assignment.sink):
                    return await unless_halted(self._halt, call)
            except RetryableError as error:
                if attempt + 1 == TRIES:
                    raise _CannotTell(error.message) from error
                await pause(self._halt, TRY_AGAIN_SECONDS)
            except UserError as error:
                raise _CannotTell(error.message) from error
        raise AssertionError("unreachable")

    async def _compare(self, tally: Tally, partition: str, keys: Sequence[Key]) -> _Wrong:
        expected = tally.expected(partition, keys)
        if not expected:
            return _Wrong()
        found = await self._copies(partition, list(expected))
        there = {key for key, copies in expected.items() if copies}
        gone, back = there - found.keys, found.keys - there
        some = [*gone, *back] or list(found.keys)
        return _Wrong(found.rows - len(found.keys), len(gone), len(back), some)

    async def _compare_still(self, tally: Tally, partition: str, keys: Sequence[Key]) -> _Wrong:
        """With no write under way."""
        async with self._stillness():
            return await self._compare(tally, partition, keys)

    @asynccontextmanager
    async def _stillness(self) -> Any:
        core, until = self._core, time.monotonic() + STILL_SECONDS
        core.still = True
        self._post(look_again)
        try:
            while not (core.sequencer.idle and core.at_rest):
                if time.monotonic() > until:
                    raise RetryableError("SINK_BUSY", "writes did not come to their end in time")
                await asyncio.sleep(0.02)
            yield
        finally:
            core.still = False
            self._post(look_again)

    async def _doubled_key(self, partition: str, keys: list[Key]) -> list[Key]:
        """One of them, for people."""
        try:
            while len(keys) > 1:
                half = keys[: len(keys) // 2]
                found = await self._copies(partition, half)
                keys = half if found.rows > len(found.keys) else keys[len(half) :]
        except CdcError:
            return []
        return keys

    async def _copies(self, partition: str, keys: Sequence[Key]) -> Copies:
        assert self._sink is not None
        target = self._sink.target(self._object.placed)
        found = await self._sink.copies(target, partition, keys)
        if found is None:
            raise _CannotTell("the collection is not loaded there, or the sink has no such count")
        return found
