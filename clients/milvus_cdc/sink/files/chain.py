"""The manifests of one collection as a chain: its newest link, adding one, reading them all.

Laws: a link is added only where none is (`Store.create`), so of two writers one goes on and the
other finds out. What was added is never changed. Links that are not among the newest are folded,
100 to a file and later 10,000, and then removed one by one, so that a folder never holds many
hundreds of them and opening costs one listing and one read; a folded number that some writer of the
past adds once more is in nobody's eyes.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import orjson

from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.sink.files import manifest as manifests
from milvus_cdc.sink.files import places
from milvus_cdc.sink.files.manifest import Manifest
from milvus_cdc.sink.files.store import MissingError, Store

FOLD = 100
"""Links to a folded file, and folded files to a larger one."""
KEEP = 100
"""At least so many of the newest stay as they are."""
_READS_AT_ONCE = 16
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Listing:
    """What is there; `loose` without what is folded."""

    loose: tuple[int, ...]
    folded: tuple[tuple[int, int], ...]
    """Ranges that do not overlap, ascending."""
    surplus: tuple[str, ...]
    """Paths of what a larger folded file holds too."""

    @property
    def newest(self) -> int:
        """0 when there is none."""
        return self.loose[-1] if self.loose else 0


class Chain:
    """Of one collection, whose folder is `folder`."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._folder = folder
        self._mine: dict[int, Manifest] = {}

    def listing(self) -> Listing:
        found = self._store.entries(f"{self._folder}/{places.MANIFESTS}")
        loose: list[int] = []
        ranges: list[tuple[int, int]] = []
        for entry in found:
            if (number := places.manifest_number(entry.path)) is not None:
                loose.append(number)
            elif (span := places.folded_range(entry.path)) is not None:
                ranges.append(span)
        folded: list[tuple[int, int]] = []
        surplus: list[str] = []
        for span in sorted(ranges, key=lambda each: (each[0], -each[1])):
            if folded and span[1] <= folded[-1][1]:
                surplus.append(self._path(places.folded_path(*span)))
            else:
                folded.append(span)
        end = folded[-1][1] if folded else 0
        surplus += [self._path(places.manifest_path(number)) for number in loose if number <= end]
        kept = sorted(number for number in loose if number > end)
        return Listing(tuple(kept), tuple(folded), tuple(surplus))

    def newest(self) -> Manifest | None:
        for _ in range(5):
            listing = self.listing()
            if not listing.newest:
                if listing.folded:
                    raise _gap(self._folder, listing.folded[-1][1] + 1)
                return None
            try:
                return self.read(listing.newest)
            except MissingError:
                continue
        raise RetryableError("SINK_BUSY", f"{self._folder}: manifests come and go all the time")

    def read(self, number: int) -> Manifest:
        """Raises MissingError."""
        path = self._path(places.manifest_path(number))
        return manifests.load(self._store.get(path), path)

    def publish(self, manifest: Manifest) -> bool:
        """False when its number is taken. Raises UnknownOutcomeError."""
        path = self._path(places.manifest_path(manifest.number))
        if not self._store.create(path, manifests.dump(manifest)):
            return False
        self._mine[manifest.number] = manifest
        return True

    def read_all(self, first: int = 1) -> Iterator[Manifest]:
        """From that number on, in order, without a gap, as of the listing at the start."""
        at = first
        for _ in range(5):
            listing = self.listing()
            try:
                for each in self._read_listed(listing, at):
                    if each.number != at:
                        raise _gap(self._folder, at)
                    at += 1
                    yield each
            except MissingError:
                # Folded between the listing and the read.
                continue
            return
        raise RetryableError("SINK_BUSY", f"{self._folder}: manifests come and go all the time")

    def _read_listed(self, listing: Listing, first: int) -> Iterator[Manifest]:
        for begin, end in listing.folded:
            if end >= first:
                for each in self._read_folded(begin, end):
                    if each.number >= first:
                        yield each
        wanted = [number for number in listing.loose if number >= first]
        yield from _at_once(self.read, wanted)

    def _read_folded(self, first: int, last: int) -> list[Manifest]:
        path = self._path(places.folded_path(first, last))
        try:
            lines = gzip.decompress(self._store.get(path)).splitlines()
            return [manifests.from_json(orjson.loads(line)) for line in lines]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                "MANIFEST_UNREADABLE",
                f"{path}: {type(error).__name__}: {error}; restore the file from a copy, or move "
                f"{self._folder} away and resync the collection",
                field="sink.files.uri",
            ) from error

    def fold(self) -> None:
        """Folds what is due; after a crash in it everything is still there once or twice. Only the
        owner calls it.
        """
        listing = self.listing()
        ranges = list(listing.folded)
        begin = ranges[-1][1] + 1 if ranges else 1
        surplus = list(listing.surplus)
        while begin + FOLD - 1 <= listing.newest - KEEP:
            numbers = range(begin, begin + FOLD)
            held = {number for number in numbers if number in self._mine}
            others = [number for number in numbers if number not in held]
            links = {each.number: each for each in _at_once(self.read, others)}
            links |= {number: self._mine[number] for number in held}
            self._put_folded([links[number] for number in numbers])
            surplus += [self._path(places.manifest_path(number)) for number in numbers]
            ranges.append((begin, begin + FOLD - 1))
            begin += FOLD
        small = [span for span in ranges if span[1] - span[0] + 1 == FOLD]
        while len(small) >= 2 * FOLD:
            chosen, small = small[:FOLD], small[FOLD:]
            links_of = [each for span in chosen for each in self._read_folded(*span)]
            self._put_folded(links_of)
            surplus += [self._path(places.folded_path(*span)) for span in chosen]
        self._store.remove(surplus)
        newest = listing.newest
        self._mine = {n: each for n, each in self._mine.items() if n > newest - KEEP - FOLD}

    def _put_folded(self, links: list[Manifest]) -> None:
        path = places.folded_path(links[0].number, links[-1].number)
        data = gzip.compress(b"".join(map(manifests.dump, links)), 6)
        self._store.put(self._path(path), data)

    def _path(self, path: str) -> str:
        return f"{self._folder}/{path}"


def locate(store: Store, database: str, collection: str, collection_id: int) -> str | None:
    """The folder of the collection that has this name now; None when there is none."""
    folder = places.collection_folder(database, collection, collection_id)
    if Chain(store, folder).listing().newest:
        return folder
    try:
        moved = orjson.loads(store.get(f"{folder}/{places.LOCATION}"))["folder"]
    except (MissingError, ValueError, KeyError):
        return None
    return str(moved)


def _at_once(read: Callable[[int], _T], numbers: Iterable[int]) -> Iterator[_T]:
    """In order, several under way."""
    wanted = list(numbers)
    if len(wanted) <= 1:
        yield from map(read, wanted)
        return
    with ThreadPoolExecutor(_READS_AT_ONCE, "manifests") as pool:
        yield from pool.map(read, wanted)


def _gap(folder: str, number: int) -> UserError:
    return UserError(
        "MANIFEST_MISSING",
        f"{folder}: manifest {number} is missing, so it cannot be told what is complete; restore "
        "the file from a copy, or move the folder away and resync the collection",
        field="sink.files.uri",
    )
