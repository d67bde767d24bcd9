"""What the controller has assigned to this process: started, changed and let go of on its word.

Laws: starting and letting go of one assignment happen one after the other; Released is said when
nothing of it runs any more. What is let go of tells its final checkpoint first.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import structlog
from milvus_cdc.model import split_assignment_id
from milvuscdc.v1 import replication_service_pb2 as pb

from milvus_cdc_replicator.core.holdings import Holdings, Verdict
from milvus_cdc_replicator.metadata import MetadataRunner
from milvus_cdc_replicator.outbox import Outbox
from milvus_cdc_replicator.pacing import Pacers
from milvus_cdc_replicator.runner import CollectionRunner
from milvus_cdc_replicator.spec import (
    Assignment,
    CollectionAssignment,
    MetadataAssignment,
    from_assign,
)
from milvus_cdc_replicator.telling import Runner, Telling
from milvus_cdc_replicator.turns import Turns

log = structlog.get_logger()

AFTER_BREAK_SECONDS = 10.0
"""Sinks are compared again within it: who was away may have missed something."""
RESTING_SECONDS = 3.0
"""Where nothing happens, a checkpoint may be this much older; the controller may ask for more."""


class Assigned:
    """All assignments of the process."""

    def __init__(
        self,
        outbox: Outbox,
        telling: Telling,
        pacers: Pacers,
        *,
        collection: Callable[[CollectionAssignment], CollectionRunner],
        metadata: Callable[[MetadataAssignment], MetadataRunner],
    ) -> None:
        """`collection` and `metadata` make a runner, not yet started."""
        self._outbox = outbox
        self._telling = telling
        self._pacers = pacers
        self._collection = collection
        self._metadata = metadata
        self.holdings = Holdings()
        self.runners: dict[str, Runner] = {}
        self._wanted: dict[str, Assignment] = {}
        self._turns = Turns()
        self._silence_ms = 0
        self.resting_seconds = RESTING_SECONDS
        self.draining = False
        """Nothing new is taken."""
        self.fewer = asyncio.Event()
        """Something was taken back."""

    # ---- the controller's word

    def assign(self, message: pb.Assign) -> None:
        ids = (message.assignment_id, message.epoch, message.version)
        try:
            assignment = from_assign(message)
        except ValueError as error:
            log.error("assignment refused", assignment_id=message.assignment_id, error=str(error))
            self._outbox.send(_nack(ids, "UNSUPPORTED_ASSIGNMENT", str(error)))
            return
        assignment_id, epoch, version = ids
        if self.draining and not self.holdings.holds(assignment_id, epoch):
            nack = _nack(ids, "DRAINING", "this replicator is stopping")
            self._turns.begin(assignment_id, partial(self._say, nack))
            return
        verdict = self.holdings.assign(*ids)
        match verdict:
            case Verdict.STALE:
                return
            case Verdict.SPENT:
                said = partial(self._say, released(assignment_id, epoch))
                self._turns.begin(assignment_id, said)
                return
            case Verdict.UPDATE:
                self._update(assignment_id, assignment)
            case Verdict.START | Verdict.REPLACE:
                self._turns.begin(assignment_id, partial(self._start, assignment_id))
        self._wanted[assignment_id] = assignment
        self._outbox.send(
            pb.ConnectRequest(ack=pb.Ack(assignment_id=assignment_id, epoch=epoch, version=version))
        )

    def revoke(self, message: pb.Revoke) -> None:
        log.info(
            "revoked",
            assignment_id=message.assignment_id,
            epoch=message.epoch,
            reason=message.reason,
        )
        self._let_go(message.assignment_id, message.epoch)

    def acked(self, ack: pb.ProgressAck) -> None:
        """The controller has stored a progress."""
        runner = self.runners.get(ack.assignment_id)
        if runner is None or runner.assignment.epoch != ack.epoch:
            return
        if isinstance(runner, MetadataRunner):
            runner.acked(ack.seq)
        elif ack.horizons:
            runner.grant([(h.vchannel, h.horizon_ts) for h in ack.horizons])

    def rest(self, interval: timedelta) -> None:
        """How much older a checkpoint may be where nothing happens."""
        seconds = max(RESTING_SECONDS, interval.total_seconds())
        if seconds != self.resting_seconds:
            self.resting_seconds = seconds
            for runner in self.runners.values():
                runner.rest(seconds)

    def connected(self, silence_ms: int) -> None:
        """To a controller that takes a collection for silent after so long."""
        self._silence_ms = silence_ms
        for runner in self.runners.values():
            if isinstance(runner, CollectionRunner):
                runner.outlast(silence_ms)
                runner.compare_soon(random.uniform(0, AFTER_BREAK_SECONDS))

    # ---- the end of the process

    async def let_go_of_all(self) -> None:
        for assignment_id, held in self.holdings.all().items():
            self._let_go(assignment_id, held.epoch)
        await self._turns.ended()

    async def stop(self) -> None:
        """Without a word."""
        for runner in list(self.runners.values()):
            await runner.stop()

    # ---- one assignment

    def _update(self, assignment_id: str, assignment: Assignment) -> None:
        """For what runs; a start that waits for its turn takes the newest by itself."""
        runner = self.runners.get(assignment_id)
        if runner is None or runner.assignment.epoch != assignment.epoch:
            return
        if isinstance(runner, CollectionRunner) and isinstance(assignment, CollectionAssignment):
            runner.update(assignment)
        elif isinstance(runner, MetadataRunner) and isinstance(assignment, MetadataAssignment):
            runner.update(assignment)

    async def _say(self, message: pb.ConnectRequest) -> None:
        self._outbox.send(message)

    async def _start(self, assignment_id: str) -> None:
        old = self.runners.get(assignment_id)
        held = self.holdings.all().get(assignment_id)
        if old is not None and held is not None and old.assignment.epoch == held.epoch:
            return  # an earlier turn took this word already
        if old is not None:
            del self.runners[assignment_id]
            await old.stop()
            held = self.holdings.all().get(assignment_id)
        if held is None:
            return  # revoked meanwhile: its release has the next turn
        assignment = self._wanted[assignment_id]
        runner: Runner
        if isinstance(assignment, CollectionAssignment):
            runner = self._collection(assignment)
            runner.outlast(self._silence_ms)
        else:
            runner = self._metadata(assignment)
        runner.rest(self.resting_seconds)
        self.runners[assignment_id] = runner
        runner.start()

    def _let_go(self, assignment_id: str, epoch: int) -> None:
        self.holdings.revoke(assignment_id, epoch)
        self.fewer.set()
        self._turns.begin(assignment_id, partial(self._release, assignment_id, epoch))

    async def _release(self, assignment_id: str, epoch: int) -> None:
        """Stops it, tells the final checkpoint, lets go."""
        runner = self.runners.get(assignment_id)
        if runner is not None and runner.assignment.epoch <= epoch:
            del self.runners[assignment_id]
            await runner.stop()
            self._outbox.tell_no_more(assignment_id)
            self._outbox.send(pb.ConnectRequest(progress=self._telling.progress(runner)))
            self._telling.forget(runner)
            self._pacers.forget({split_assignment_id(each)[0] for each in self.runners})
        self._outbox.send(released(assignment_id, epoch))


def released(assignment_id: str, epoch: int) -> pb.ConnectRequest:
    """Nothing of it runs here any more."""
    return pb.ConnectRequest(released=pb.Released(assignment_id=assignment_id, epoch=epoch))


def _nack(ids: tuple[str, int, int], reason: str, message: str) -> pb.ConnectRequest:
    assignment_id, epoch, version = ids
    return pb.ConnectRequest(
        nack=pb.Nack(
            assignment_id=assignment_id,
            epoch=epoch,
            version=version,
            reason=reason,
            message=message,
        )
    )
