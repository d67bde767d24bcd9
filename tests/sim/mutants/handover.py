"""Of epochs, hand-overs and the source's metadata."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from milvus_cdc.catalog import watch as catalogue_watch
from milvus_cdc.order.ops import Rank
from milvus_cdc_controller.core import (
    assigning,
    collection,
    events,
    granting,
    moves,
    names,
    placing,
    sessions,
)
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.granting import let_go
from milvus_cdc_replicator import assigned, runner
from milvus_cdc_replicator.core import assignment, holdings

from tests.sim.mutants import handle, mutant, put

# Epochs and the hand-off.


@mutant("a message counts whatever its epoch and sender")
def epoch_not_compared(stack: ExitStack) -> None:
    def own(world: Any, stream: int, assignment_id: str, epoch: int) -> Any:
        if world.session_of(stream) is None:
            return None
        grant = world.grants.get(assignment_id)
        return grant if grant is not None and grant.instance else None

    put(stack, sessions, "_own", own)


@mutant("a new owner gets the old one's epoch")
def epoch_not_advanced(stack: ExitStack) -> None:
    def give(world: Any, assignment_id: str, to: Any) -> None:
        old = world.grants.get(assignment_id) or Grant(assignment_id)
        epoch = max(old.epoch, 1)
        grant = Grant(assignment_id, epoch, to.name, to.instance, world.now.wall_ms)
        world.put_grant(grant)
        granting.send_assign(world, grant)

    put(stack, placing, "give", give)


@mutant("a revoked assignment is free before its owner has let go")
def release_not_awaited(stack: ExitStack) -> None:
    revoke = granting.revoke

    def at_once(world: Any, grant: Any, reason: str) -> None:
        revoke(world, grant, reason)
        let_go(world, grant)

    for module in (assigning, moves, sessions):
        put(stack, module, "revoke", at_once)


@mutant("Released is said before the last request has ended")
def released_too_early(stack: ExitStack) -> None:
    release = assigned.Assigned._release

    async def early(self: Any, assignment_id: str, epoch: int) -> None:
        self._outbox.send(assigned.released(assignment_id, epoch))
        await release(self, assignment_id, epoch)

    put(stack, assigned.Assigned, "_release", early)


@mutant("stopping a collection does not wait for its requests")
def stop_does_not_wait(stack: ExitStack) -> None:
    async def stop(self: Any) -> None:
        self._stopping = True
        self._halt.set()
        self._intake.close()
        self._wake.set()

    put(stack, runner.CollectionRunner, "stop", stop)


@mutant("an epoch that was let go runs again when it is assigned again")
def spent_epoch_runs_again(stack: ExitStack) -> None:
    assign = holdings.Holdings.assign

    def again(self: Any, assignment_id: str, epoch: int, version: int) -> Any:
        self._spent.pop(assignment_id, None)
        return assign(self, assignment_id, epoch, version)

    put(stack, holdings.Holdings, "assign", again)


@mutant("who comes back with an epoch that is over is not told")
def stale_holder_not_told(stack: ExitStack) -> None:
    handler = sessions.hello
    handle(stack, events.Hello, lambda world, event: handler(world, replace(event, held=())))


# Metadata.


@mutant("after a compaction the metadata is not listed again")
def relist_skipped(stack: ExitStack) -> None:
    list_all = catalogue_watch.CatalogueWatcher._list

    async def once(self: Any) -> Any:
        known = getattr(self, "first_list", None)
        fresh = await list_all(self)
        if known is None:
            self.first_list = fresh
            return fresh
        return known[0], replace(known[1], revision=fresh[1].revision)

    async def read_after(self: Any, running: Any) -> Any:
        if running is not None:
            await asyncio.wait({running})
        self._reading, self._queued = self._queued, None
        return (await list_all(self))[1]

    put(stack, catalogue_watch.CatalogueWatcher, "_list", once)
    put(stack, catalogue_watch.CatalogueWatcher, "_read_after", read_after)


@mutant("a dropped partition's marker is passed without dropping it")
def partition_drop_passed(stack: ExitStack) -> None:
    put(stack, assignment.AssignmentCore, "_ready_drop", _pass_marker)


def _pass_marker(self: Any) -> list[Any]:
    for lane in self.lanes.values():
        if lane.staged and lane.staged[0].rank is Rank.MARKER:
            self._leave_out(lane)
    return []


@mutant("a name at the sink goes to the next one while it is still held")
def name_given_twice(stack: ExitStack) -> None:
    put(stack, names.Names, "ready", _everybody)


@mutant("a collection is dropped as soon as one shard has come to its end")
def drop_before_all_shards(stack: ExitStack) -> None:
    put(
        stack,
        collection.CollectionProgress,
        "closed",
        property(lambda self: any(point.closed for point in self.checkpoints)),
    )


def _everybody(self: Any) -> Any:
    return [claim for claim in self._claims.values() if claim.waits]
