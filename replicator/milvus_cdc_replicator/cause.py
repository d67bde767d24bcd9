"""Whose doing a difference at the sink is: the source's, or somebody else's.

Law: the source's changes are those since an owner last said that all was as wanted; where nobody
ever said so, everything counts as the source's.
"""

from __future__ import annotations

from collections.abc import Collection as AnyCollection

from milvus_cdc.model import ObjectState
from milvus_cdc.sink.differences import Action, ObjectDifference

from milvus_cdc_replicator.spec import Applied, CollectionAssignment

Place = tuple[str, str]
"""Kind and name of an object."""


def by_source(
    assignment: CollectionAssignment,
    base: Applied | None,
    difference: ObjectDifference,
    *,
    mended: AnyCollection[Place],
    first: AnyCollection[Place],
) -> bool:
    """`base`: what was applied last; `mended` in this comparison, `first` found by its first look:
    what mending brings with it is the source's, too.
    """
    want = assignment.want
    touched = assignment.applied or base
    if base is None or touched is None or difference.place in mended:
        return True
    match difference.kind:
        case "index":
            changed = set(base.indexes) ^ set(want.indexes)
            names = {index.name for index in changed} | touched.touched_indexes
            return difference.name in names
        case "load":
            alive = Applied.of(want).partition_ids
            # Some servers let an index or a property be changed only after a release.
            released = difference.place not in first and bool(mended)
            changed_load = touched.touched_load or base.load != want.load
            return released or changed_load or base.partition_ids != alive
        case "property":
            return want.alter_ts > base.alter_ts
        case "partition":
            drop = difference.action is Action.DROP
            return any(
                p.name == difference.name
                and (
                    p.state is ObjectState.DROPPED
                    if drop
                    else p.partition_id not in base.partition_ids
                )
                for p in want.partitions
            )
    return False
