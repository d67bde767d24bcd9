"""How one collection is found at its sink, under one of the names that it may have there, or made.

Law: what was there once and is missing is neither made anew nor taken for another one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from milvus_cdc.errors import UserError
from milvus_cdc.model import Collection, Drift
from milvus_cdc.sink import Opened, Sink

from milvus_cdc_replicator.sink_work import SinkWork
from milvus_cdc_replicator.spec import CollectionAssignment

_NOT_THERE = frozenset(
    {"SINK_COLLECTION_MISSING", "SINK_COLLECTION_REPLACED", "SINK_NAME_IS_ALIAS"}
)


def name_of(want: Collection) -> tuple[str, str]:
    return want.database, want.name


def named(want: Collection, name: tuple[str, str]) -> Collection:
    """The same under another name."""
    return want if name_of(want) == name else replace(want, database=name[0], name=name[1])


async def open_collection(
    sink: Sink,
    work: SinkWork,
    assignment: CollectionAssignment,
    check_log: Callable[[], Awaitable[None]],
) -> tuple[Collection, Opened] | None:
    """What is wanted with the name that it has at the sink, and what the sink says of it; None when
    told to stop before. `check_log` raises when the log is not there to fill it anew from. Raises
    UserError.
    """
    want = assignment.want
    renamed_from = assignment.renamed_from
    places = [want]
    if renamed_from is not None and not assignment.recreate:
        # An owner before may have renamed it without living to say so.
        places.append(named(want, renamed_from))
    answers: list[tuple[Collection, Opened]] = []

    async def find_or_make() -> None:
        if assignment.recreate:
            await check_log()
            if renamed_from is not None:
                old = named(want, renamed_from)
                await sink.drop_collection(old, sink_collection_id=0)
        if assignment.carry.schema:
            await sink.ensure_database(want.database)
        for place in places:
            try:
                opened = await _open_at(sink, assignment, place)
            except UserError as error:
                if error.reason not in _NOT_THERE or place is places[-1]:
                    raise
            else:
                answers.append((place, opened))
                return

    if not await work.open(find_or_make):
        return None
    place, opened = answers[-1]
    if assignment.part and opened.writes_in_flight:
        raise UserError(
            "SINK_TAKES_NO_PARTS",
            f"the sink of {want.full_name} takes one write at a time; set split.max_parts of "
            "the task to 0, then `milvus-cdc task retry`",
            field="split.max_parts",
        )
    return place, opened


async def _open_at(sink: Sink, assignment: CollectionAssignment, place: Collection) -> Opened:
    applied = assignment.applied
    if applied is not None and assignment.drift is Drift.REPORT:
        # What was there and is missing now is drift: told, not mended.
        kept = (p for p in place.partitions if p.partition_id not in applied.partition_ids)
        place = replace(place, partitions=tuple(kept))
    return await sink.open_collection(
        place,
        opened=assignment.opened,
        adopt=assignment.adopt_existing,
        recreate=assignment.recreate,
        sink_collection_id=assignment.sink_collection_id,
        create=assignment.carry.schema,
    )
