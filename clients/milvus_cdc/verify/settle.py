"""Differing keys, looked at again until they agree or really differ.

Rows may be on their way while a comparison runs. A key is settled when both sides agree, or when
the sink shows a version that the source showed in an earlier round: then the sink follows and the
source has moved on. What still differs when the patience ends differs. Keys still changing on both
sides get a second helping before that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from milvus_cdc.verify.keys import Key
from milvus_cdc.verify.reader import Side
from milvus_cdc.verify.rows import Comparison, Rows, compare

_DELAYS = (0.5, 0.5, 1.0, 2.0, 3.0, 3.0)
_DELAYS_MOVING = (1.0, 2.0, 3.0, 4.0)
_ABSENT = b""


@dataclass(slots=True)
class Patience:
    """Seconds that may still be slept for one collection, whatever the number of its
    differences."""

    seconds: float = 10.0

    def delays(self) -> Iterator[float]:
        """Sleeps between rounds; the first round comes at once."""
        yield 0.0
        for delay in _DELAYS:
            if self.seconds <= 0:
                return
            delay = min(delay, self.seconds)
            self.seconds -= delay
            yield delay


@dataclass(slots=True)
class Settled:
    """What really differs."""

    differences: Comparison = field(default_factory=Comparison)
    moving: int = 0
    """Of these, keys that both sides were still changing."""


@dataclass(slots=True)
class _Sight:
    """What a key looked like so far."""

    versions: set[bytes] = field(default_factory=set)
    source: bytes | None = None
    sink: bytes | None = None
    moving: bool = False


async def settle(
    source: Side,
    sink: Side,
    fields: Sequence[str],
    keys: Sequence[Key],
    patience: Patience,
    on_round: Callable[[], Awaitable[None]],
) -> Settled:
    sights = {key: _Sight() for key in keys}
    found = Comparison()
    for delay in patience.delays():
        found = await _round(source, sink, fields, sights, delay, on_round)
        if not sights:
            return Settled(found)
    for delay in _DELAYS_MOVING:
        if not any(sight.moving for sight in sights.values()):
            break
        found = await _round(source, sink, fields, sights, delay, on_round)
    return Settled(found, sum(sight.moving for sight in sights.values()))


async def _round(
    source: Side,
    sink: Side,
    fields: Sequence[str],
    sights: dict[Key, _Sight],
    delay: float,
    on_round: Callable[[], Awaitable[None]],
) -> Comparison:
    await asyncio.sleep(delay)
    await asyncio.gather(source.refresh(), sink.refresh())
    total = Comparison()
    keys = list(sights)
    while keys:
        size = min(source.page_rows, sink.page_rows)
        chunk, keys = keys[:size], keys[size:]
        # The source first: a sink that follows can then only be ahead of what was seen, never seem
        # behind.
        source_rows = await source.fetch(chunk)
        sink_rows = await sink.fetch(chunk)
        found = compare(source_rows, sink_rows, fields)
        differing = {*found.missing, *found.extra, *(key for key, _ in found.different)}
        source_places, sink_places = _places(source_rows), _places(sink_rows)
        for key in chunk:
            if key not in differing:
                del sights[key]
                continue
            ours = _version(source_rows, source_places, key)
            theirs = _version(sink_rows, sink_places, key)
            sight = sights[key]
            if theirs in sight.versions and theirs != ours:
                del sights[key]
                continue
            sight.moving = sight.source not in (None, ours) and sight.sink not in (None, theirs)
            sight.source, sight.sink = ours, theirs
            sight.versions.add(ours)
        total.missing += [key for key in found.missing if key in sights]
        total.extra += [key for key in found.extra if key in sights]
        total.different += [entry for entry in found.different if entry[0] in sights]
        await on_round()
    return total


def _places(rows: Rows) -> dict[Key, int]:
    return {rows.key(i): i for i in range(len(rows))}


def _version(rows: Rows, places: dict[Key, int], key: Key) -> bytes:
    place = places.get(key)
    return _ABSENT if place is None else rows.digest(place)
