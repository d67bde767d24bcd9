"""How often the sink should hold each key that a lost owner may have written.

Laws: exact for every key that an operation of the window names, through all operations on it that
are taken afterwards; a key that the source itself doubles is left out, and one that the sink
refused. While what was taken before is still being read, what is taken now waits in order, for
nobody knows yet which keys it concerns. Bounded: without room nothing is remembered any more, and
that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

from milvus_cdc.order.ops import Key, LogOp

from milvus_cdc_replicator.core.ops import WriteKind

KEY_BYTES = 90
"""Of an entry and its integer; of a text beside its characters."""
WAITING_BYTES = 600
"""Of an operation that waits, beside its keys."""
ANYWHERE = ""
SEVERAL = -1


class Tally:
    """Partitions as the sink knows them. `named`: rows name one (no partition key); then a key that
    was only deleted stands under ANYWHERE, until it comes back somewhere.
    """

    def __init__(self, set_aside: Callable[[int], bool], *, named: bool) -> None:
        """`set_aside` takes bytes of memory, or gives them back; False when there is no room."""
        self.full = False
        self._set_aside = set_aside
        self._named = named
        self._copies: dict[str, dict[Key, int]] = {}
        self._held_bytes = 0
        self._waiting: list[Callable[[], None]] | None = None
        self._waiting_bytes = 0

    def await_past(self) -> None:
        """Operations before those to come will be named by `took_before`, until `past_read`."""
        self._waiting = []

    def past_read(self) -> None:
        """What has waited for it takes effect."""
        waiting, self._waiting = self._waiting or [], None
        self._set_aside(-self._waiting_bytes)
        self._waiting_bytes = 0
        for took in waiting:
            took()

    def took(self, kind: WriteKind, partition: str, op: LogOp, *, window: bool) -> None:
        """`op` is to be written; `window`: an owner before may have sent it, too."""
        if self.full:
            return
        keys = op.keys()
        single = len(keys) == op.rows
        if self._waiting is None:
            self._take(kind, partition, keys, window=window, single=single)
        else:
            self._wait(
                partial(self._take, kind, partition, keys, window=window, single=single),
                len(keys) * KEY_BYTES + _text_bytes(keys),
            )

    def _wait(self, take: Callable[[], None], size: int = 0) -> None:
        assert self._waiting is not None
        if self._room_for(WAITING_BYTES + size):
            self._waiting_bytes += WAITING_BYTES + size
            self._waiting.append(take)

    def took_before(self, kind: WriteKind, partition: str, op: LogOp) -> None:
        """`op` was written before everything that `took` names of its keys, by an owner before."""
        if not self.full:
            self._take(kind, partition, op.keys(), window=True, single=False)

    def dropped_before(self, partition: str) -> None:
        """As `forget_partition`, by an owner before."""
        self._forget_partition(partition)

    def _take(
        self, kind: WriteKind, partition: str, keys: frozenset[Key], *, window: bool, single: bool
    ) -> None:
        if self.full:
            return
        if kind is WriteKind.DELETE:
            self._deleted(partition, keys, window)
        elif window:
            self._put(partition, dict.fromkeys(keys, 1))
        else:
            self._written(kind, partition, keys, single=single)

    def _written(
        self, kind: WriteKind, partition: str, keys: Iterable[Key], *, single: bool
    ) -> None:
        here, gone = self._copies.get(partition, {}), self._copies.get(ANYWHERE, {})
        known = [key for key in keys if key in here or key in gone]
        if kind is WriteKind.UPSERT:
            self._put(partition, dict.fromkeys(known, 1))
        else:
            once = 1 if single else SEVERAL
            self._put(partition, {key: SEVERAL if here.get(key) else once for key in known})

    def _deleted(self, partition: str, keys: Iterable[Key], window: bool) -> None:
        everywhere = partition == ANYWHERE
        for name in list(self._copies) if everywhere else [partition]:
            here = self._copies.get(name, {})
            here.update((key, 0) for key in keys if key in here)
        if window:
            here = self._copies.get(partition, {})
            self._put(partition, {key: 0 for key in keys if key not in here})

    def _put(self, partition: str, copies: dict[Key, int]) -> None:
        if not copies:
            return
        here = self._copies.setdefault(partition, {})
        before = len(here)
        here.update(copies)
        added = len(here) - before
        if not added:
            return
        size = added * KEY_BYTES + _text_bytes(copies) * added // len(copies)
        if self._room_for(size):
            self._held_bytes += size

    def _room_for(self, size: int) -> bool:
        if not self._set_aside(size):
            self.full = True
            self.clear()
        return not self.full

    def forget(self, keys: Iterable[Key]) -> None:
        """What is at the sink of these is not known."""
        if self._waiting is not None:
            self._wait(partial(self._forget, keys))
        else:
            self._forget(keys)

    def _forget(self, keys: Iterable[Key]) -> None:
        for here in self._copies.values():
            for key in keys:
                if key in here:
                    here[key] = SEVERAL

    def forget_partition(self, partition: str) -> None:
        """It is dropped, with all that may come too late for it."""
        if self._waiting is not None:
            self._wait(partial(self._forget_partition, partition))
        else:
            self._forget_partition(partition)

    def _forget_partition(self, partition: str) -> None:
        self._copies.pop(partition, None)

    def clear(self) -> None:
        """Gives its memory back."""
        self._copies = {}
        self._waiting = None
        self._set_aside(-self._held_bytes - self._waiting_bytes)
        self._held_bytes = self._waiting_bytes = 0

    def chunks(self, size: int) -> Iterator[tuple[str, list[Key]]]:
        """(partition, keys), as of now; each key once."""
        for partition, copies in list(self._copies.items()):
            if self._named and partition == ANYWHERE:
                continue
            keys = iter(list(copies))
            while chunk := list(islice(keys, size)):
                yield partition, chunk

    def expected(self, partition: str, keys: Iterable[Key]) -> dict[Key, int]:
        """0 or 1 for each of them of which that is known."""
        here = self._copies.get(partition, {})
        return {key: here[key] for key in keys if here.get(key, SEVERAL) != SEVERAL}


def _text_bytes(keys: Iterable[Key]) -> int:
    return sum(len(key) for key in keys if isinstance(key, str))
