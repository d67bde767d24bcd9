"""Who holds what, by process and by task, and what must be looked at in a step: so that an event
costs what it changes, not what there is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from milvus_cdc.model import split_assignment_id

from milvus_cdc_controller.core.grant import Grant


class Held:
    """Kept true by whoever replaces a grant."""

    def __init__(self) -> None:
        self._by_instance: dict[str, dict[str, None]] = {}
        self._by_task: dict[str, dict[str, int]] = {}
        """Collections only: of the metadata assignment there is just one."""

    def put(self, before: Grant | None, now: Grant | None) -> None:
        if before is not None and before.instance:
            own = self._by_instance[before.instance]
            del own[before.assignment_id]
            if not own:
                del self._by_instance[before.instance]
            self._count(before, -1)
        if now is not None and now.instance:
            self._by_instance.setdefault(now.instance, {})[now.assignment_id] = None
            self._count(now, 1)

    def _count(self, grant: Grant, change: int) -> None:
        uid, collection_id = split_assignment_id(grant.assignment_id)
        if collection_id is None:
            return
        counts = self._by_task.setdefault(uid, {})
        counts[grant.instance] = counts.get(grant.instance, 0) + change
        if not counts[grant.instance]:
            del counts[grant.instance]
            if not counts:
                del self._by_task[uid]

    def by(self, instance: str) -> Collection[str]:
        """Assignment ids of one process, in the order in which it got them."""
        return self._by_instance.get(instance, {}).keys()

    def holders(self, uid: str) -> Collection[str]:
        """Instances that hold a collection of the task."""
        return self._by_task.get(uid, {}).keys()


class Touched:
    """Tasks, and of each the collections that something has changed of; None stands for the task
    with everything of it, no collection for its state alone.
    """

    def __init__(self, found: Mapping[str, set[int] | None] | None = None) -> None:
        self._found: dict[str, set[int] | None] = dict(found or {})

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __contains__(self, uid: object) -> bool:
        return uid in self._found

    def of(self, uid: str) -> set[int] | None:
        """Collections of a task that is in it."""
        return self._found[uid]

    def whole(self, uid: str) -> None:
        self._found[uid] = None

    def state(self, uid: str) -> None:
        self._found.setdefault(uid, set())

    def one(self, uid: str, collection_id: int) -> None:
        known = self._found.setdefault(uid, set())
        if known is not None:
            known.add(collection_id)

    def take(self, uid: str) -> set[int] | None:
        """What `of` says; the task is not in it any more."""
        return self._found.pop(uid)

    def discard(self, uid: str) -> None:
        self._found.pop(uid, None)

    def add(self, uid: str, collection_ids: set[int] | None) -> None:
        known = self._found.setdefault(uid, set())
        if collection_ids is None:
            self._found[uid] = None
        elif known is not None:
            known |= collection_ids

    def merge(self, other: Touched) -> None:
        for uid in other:
            self.add(uid, other.of(uid))
