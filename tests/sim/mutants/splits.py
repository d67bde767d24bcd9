"""Of collections that are given out in parts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from milvus_cdc_controller import wire
from milvus_cdc_controller.core import parts, placing
from milvus_cdc_controller.core.granting import is_held
from milvus_cdc_replicator.core import assignment

from tests.sim.mutants import mutant, put


@mutant("the whole is given while a part is still held, and the other way round", parts=2)
def whole_beside_parts(stack: ExitStack) -> None:
    def free(world: Any, key: str, _keys: Any, _record: Any, stale: set[str]) -> bool:
        return not (key in stale or is_held(world, key))

    put(stack, placing, "may_be_given", free)


@mutant("a part is given all shards", parts=2)
def part_of_everything(stack: ExitStack) -> None:
    put(stack, wire, "points_of", lambda _, progress: progress.checkpoints)


@mutant("what parts stand before is forgotten once they are taken back", parts=2)
def barrier_forgotten(stack: ExitStack) -> None:
    for_one = parts.is_for_one

    def by_now(record: Any, progress: Any, of: Any) -> bool:
        return for_one(record, progress, of) and not (
            0 < progress.whole_until_ts and progress.recount is None and not record.dropping
        )

    put(stack, parts, "is_for_one", by_now)


@mutant("a drop counts as done between the metadata's time of it and its message", parts=2)
def drop_taken_for_done(stack: ExitStack) -> None:
    ahead = assignment.AssignmentCore._drops_ahead

    def strictly(core: assignment.AssignmentCore, partitions: Any) -> list[Any]:
        passed = max(lane.resolved_ts for lane in core.lanes.values())
        return [p for p in ahead(core, partitions) if passed < p.drop_ts]

    put(stack, assignment.AssignmentCore, "_drops_ahead", strictly)
