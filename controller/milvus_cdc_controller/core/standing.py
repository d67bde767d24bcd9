"""How many of a task's collections run, have failed, try again or are being taken back: kept with
each change, because a task of ten thousand is asked for it every second.

Law: it says what `status.outline` says of every collection at the end of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from milvus_cdc_controller.core.collection import CollectionRecord, Counters


@dataclass(slots=True)
class Standing:
    running: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """By collection id what is held of it: one assignment id, or those of its parts. Those that are
    on their way out count.
    """
    failed: set[int] = field(default_factory=set)
    retrying: set[int] = field(default_factory=set)
    revoking: set[int] = field(default_factory=set)

    def forget(self, collection_id: int) -> None:
        self.running.pop(collection_id, None)
        self.failed.discard(collection_id)
        self.retrying.discard(collection_id)
        self.revoking.discard(collection_id)


def first(
    records: Mapping[int, CollectionRecord], collection_ids: set[int]
) -> CollectionRecord | None:
    """The one of them that comes first among the records."""
    if not collection_ids:
        return None
    return next(record for number, record in records.items() if number in collection_ids)


def in_order(
    records: Mapping[int, CollectionRecord], collection_ids: Iterable[int] | None
) -> list[CollectionRecord]:
    """Of those that are there still; all for None."""
    if collection_ids is None:
        return list(records.values())
    found = [number for number in collection_ids if number in records]
    if len(found) < 2:
        return [records[number] for number in found]
    wanted = set(found)
    return [record for number, record in records.items() if number in wanted]


class Rows:
    """Sums of counters by task."""

    def __init__(self) -> None:
        self._sums: dict[str, Counters] = {}

    def of(self, uid: str) -> Counters:
        return self._sums.get(uid) or Counters()

    def change(self, uid: str, before: Counters, now: Counters) -> None:
        if before != now:
            self._sums[uid] = self.of(uid).plus(now).minus(before)

    def forget(self, uid: str) -> None:
        self._sums.pop(uid, None)
