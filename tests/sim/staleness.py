"""Whether the sink's copies of a key are what a checkpoint says they are, whatever order the log of
the source has: rows count by their timestamps.
"""

from __future__ import annotations

from collections.abc import Iterable

from milvus_cdc.model import tso_to_ms

from tests.sim.clockwork import START_UNIX
from tests.sim.latecomers import NEVER
from tests.sim.source import Op, Table


def stale(table: Table, key: int, values: list[tuple[str, str]], until: int) -> str:
    """How the sink's copies of a key, (partition, text), are older than the source's at `until`;
    empty when they are not.
    """
    stamps = sorted(int(text) for _, text in values)
    # What is written anew passes through the partitions that a key was in since: beside the copy as
    # of `until` there may be later ones.
    moving = len({partition for partition, _ in values}) == len(values) and stamps[1:2] > [until]
    if len(values) > 1 and not moving and not _half_deleted(table, key, stamps, until):
        return f"key {key} is doubled: {[when(stamp) for stamp in stamps]}"
    op = table.last_at(key, until)
    if op is None or (op.partition is not None and op.partition.dropped):
        return ""
    if op.text is None and op.partition is not None:
        # An upsert's, alone: rows of other partitions are for a deletion that is still to come.
        stamps = sorted(int(text) for name, text in values if name == op.partition.name)
    if stamps:
        version = stamps[-1]
        # The insert of an upsert that is in halves is newer than its delete.
        half = any(other.ts == op.ts and other.text is not None for other in table.by_key[key])
        if version < op.ts or (op.text is None and version == op.ts and not half):
            return f"key {key} is of {when(version)}, the source's of {_done(op)}"
    elif op.text is not None and not any(
        other.text is None
        and other.behind_ts < NEVER
        and (other.ts > op.ts or _clears(other, op, until))
        for other in table.by_key[key]
    ):
        return f"key {key} is missing, the source's is of {_done(op)}"
    return ""


def undecidable(table: Table, key: int, until: int, starts: Iterable[int]) -> bool:
    """With one of these checkpoints an owner began between the newest that was done to the key and
    something older that came late: it took the older for the newer (ARCHITECTURE.md, "Late
    messages"). `until` is the checkpoint that says what is the newest.
    """
    newest = table.last_at(key, until)
    if newest is None:
        return False
    for late in table.by_key[key]:
        if late is newest:
            break
        if any(newest.due <= start < late.due for start in starts):
            return True
    return False


def _clears(late: Op, op: Op, until: int) -> bool:
    """It came late and is of all partitions: it goes before what is newer, and that once more."""
    return bool(late.behind_ts) and late.due > until and late.partition is None


def _half_deleted(table: Table, key: int, stamps: list[int], until: int) -> bool:
    """What deletes all copies but the newest came late, and no checkpoint says that it is done."""
    return any(
        op.text is None and op.behind_ts and op.due > until and stamps[-2] < op.ts <= stamps[-1]
        for op in table.by_key[key]
    )


def _done(op: Op) -> str:
    return f"{when(op.ts)}{' (deleted)' if op.text is None else ''}"


def when(ts: int) -> str:
    """A TSO as the story tells time."""
    return f"{tso_to_ms(ts) / 1000 - START_UNIX:.3f}#{ts & 0x3FFFF}" if ts else "never"
