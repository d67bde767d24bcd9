"""Names the keys that are stored more than once, by halving key ranges with `count(*)`."""

from __future__ import annotations

from milvus_cdc.verify.keys import Key
from milvus_cdc.verify.reader import Side
from milvus_cdc.verify.rows import Rows


async def doubled_keys(
    source: Side, sink: Side, after: Key | None, rows: Rows, upto: Key | None, most: int
) -> list[Key]:
    """At most `most` keys of the sink's page `rows` that the sink holds more often than the source
    does.

    Each costs about two queries per halving of the page.
    """
    found: list[Key] = []
    ranges = [(0, len(rows))]
    while ranges and len(found) < most:
        start, end = ranges.pop()
        if start == end:
            continue
        low = rows.key(start - 1) if start else after
        high = rows.key(end - 1)
        if not await sink.surplus(low, high, end - start):
            continue
        if end - start == 1:
            key = rows.key(start)
            copies = await sink.count_keys([key])
            if copies > 1 and copies > max(1, await source.count_keys([key])):
                found.append(key)
            continue
        middle = (start + end) // 2
        ranges += [(middle, end), (start, middle)]
    return found
