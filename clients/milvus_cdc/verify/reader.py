"""Pages of one side in key order, each proved complete.

A page is proved by counting: `count(*)` over exactly its key range must give as many rows as the
page holds. Seen on Milvus 2.3.5: a query with a limit applies it per segment before doubled keys
are removed, so keys are skipped silently where keys are doubled; a query whose limit is at least
the range's `count(*)` cannot skip any. What the count has over the distinct keys then is the
surplus of doubled keys. Also seen there: no query ever returns the row with key
9223372036854775807 (its merge starts from that value as a sentinel), though `count(*)` counts it.

Where rows cannot be counted (Milvus 2.2), a page is a key range read without a limit: complete, but
silent about keys that are stored twice.

Memory: a page is at most about `page_bytes`, once its rows have shown their size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from milvus_cdc.errors import BugError, UserError
from milvus_cdc.sink.milvus.capabilities import Capabilities
from milvus_cdc.verify.connection import ANSWER_TOO_LARGE, Reads
from milvus_cdc.verify.keys import INT64_MAX, Key, KeyField
from milvus_cdc.verify.rows import Rows, rows_of

if TYPE_CHECKING:
    from pymilvus.grpc_gen import common_pb2, milvus_pb2
else:
    from milvus_cdc.milvus_protos import common_pb2, milvus_pb2

MAX_ROWS = 16384
"""`quotaAndLimits.limits.maxQueryResultWindow` of Milvus: offset + limit."""
_FIRST_ROWS = 1000
_RECOUNTS = 5


@dataclass(frozen=True, slots=True)
class Page:
    """Every row with `after` < key <= `upto` (None: to the end)."""

    rows: Rows
    upto: Key | None
    surplus: int = 0
    """Copies beyond one per key in this range."""
    hidden_max_key: bool = False
    """The row with the largest int64 key is there and cannot be read."""


class Side:
    """One collection, or one partition of it, at one cluster. Rows acknowledged before `refresh`
    are all seen."""

    def __init__(
        self,
        reads: Reads,
        *,
        database: str,
        collection: str,
        partition: str,
        key: KeyField,
        fields: Sequence[str],
        page_bytes: int,
        row_bytes: int,
        capabilities: Capabilities,
    ) -> None:
        self._reads = reads
        self._able = capabilities
        self._database = database
        self._collection = collection
        self._partitions = [partition] if partition and capabilities.partitions else []
        self._key = key = replace(key, sums=capabilities.constant_sums)
        self._fields = [key.name, *fields]
        self._page_bytes = page_bytes
        self._row_bytes = float(max(row_bytes, 16))
        self._guarantee_ts = 0

    async def refresh(self) -> None:
        """Moves the view to the cluster's now."""
        self._guarantee_ts = await self._reads.timestamp()

    @property
    def page_rows(self) -> int:
        """Rows that make a page of about the wished size."""
        fit = int(self._page_bytes / self._row_bytes)
        # Powers of two keep both sides' pages the same length while estimates wobble.
        return min(max(1, 1 << max(fit, 1).bit_length() - 1), MAX_ROWS)

    @property
    def counts(self) -> bool:
        """Rows can be counted: without that, keys stored twice cannot be seen."""
        return self._able.count

    async def count(self, expr: str = "") -> int:
        """BugError where rows cannot be counted."""
        if not self._able.count:
            raise BugError("CANNOT_COUNT", f"{self._able.name} has no count(*)")
        if not expr and self._able.ordered_by:
            # Without an expression milvus-lite 3.2 counts all partitions.
            expr = self._key.between(None, None)
        answer = await self._query(expr, ["count(*)"], None)
        return int(answer.fields_data[0].scalars.long_data.data[0])

    async def fetch(self, keys: Sequence[Key]) -> Rows:
        """The rows of these keys, one each; at most `page_rows` keys should be asked for."""
        if not keys:
            return Rows([] if self._key.is_string else np.empty(0, np.int64), {})
        return await self._rows(self._key.any_of(keys), None)

    async def count_keys(self, keys: Sequence[Key]) -> int:
        """0 where rows cannot be counted."""
        if not self._able.count:
            return 0
        return await self.count(self._key.any_of(keys))

    async def page(self, after: Key | None, limit: int) -> Page:
        """The next rows above `after`, about `limit` of them."""
        limit = min(limit, MAX_ROWS)
        while True:
            try:
                return await self._page(after, limit)
            except UserError as err:
                if err.reason != ANSWER_TOO_LARGE or limit == 1:
                    raise
                limit = max(1, limit // 4)
                self._row_bytes = max(self._row_bytes, self._page_bytes / limit)

    async def _page(self, after: Key | None, limit: int) -> Page:
        # Keys first: an open range with a limit makes every segment fetch that many whole rows.
        known = await self._rows(self._key.between(after, None), limit, keys_only=True)
        upto = known.key(len(known) - 1) if len(known) >= limit else None
        most = min(MAX_ROWS, max(64, 2 * limit))
        counts: list[int] = []
        if not self._able.count:
            # Without a limit nothing is skipped, and the range bounds what comes.
            return Page(await self._rows(self._key.between(after, upto), None), upto)
        while True:
            expr = self._key.between(after, upto)
            counted, rows = await asyncio.gather(self.count(expr), self._rows(expr, most))
            if counted == len(rows):
                return Page(rows, upto)
            if counted > most and len(known) and upto != known.key(0):
                # Keys were skipped because others are doubled: a shorter range shows them.
                upto = known.key((len(known) - 1) // 2)
                known, counts = known.upto(upto), []
                continue
            if counted > most and most < MAX_ROWS:
                # One key only (the smallest is never skipped), with very many copies.
                most = min(MAX_ROWS, counted)
                continue
            counts.append(counted)
            # Doubled keys, or a write in between; a second equal count rules the latter out.
            if counts[-2:-1] == [counted] or len(counts) == _RECOUNTS:
                surplus = max(0, min(counts[-2:]) - len(rows))
                hidden = surplus > 0 and upto is None and await self._max_key_hidden()
                return Page(rows, upto, surplus - hidden, hidden)

    async def surplus(self, after: Key | None, upto: Key | None, distinct: int) -> int:
        """Copies beyond `distinct` keys in this range; 0 where they cannot be counted."""
        if not self._able.count:
            return 0
        return max(0, await self.count(self._key.between(after, upto)) - distinct)

    async def _max_key_hidden(self) -> bool:
        if self._key.is_string:
            return False
        expr = f"{self._key.name} == {INT64_MAX}"
        return await self.count(expr) > 0 and not len(await self._rows(expr, 1))

    async def _rows(self, expr: str, limit: int | None, *, keys_only: bool = False) -> Rows:
        fields = [self._key.name] if keys_only else self._fields
        answer = await self._query(expr, fields, limit)
        try:
            rows = rows_of(answer, self._key)
        except (ValueError, KeyError) as err:
            where = f"{self._database}.{self._collection}"
            raise BugError("UNREADABLE_ANSWER", f"query of {where}: {err}") from err
        if len(rows) and not keys_only:
            self._row_bytes = max(16.0, rows.size / len(rows))
        return rows

    async def _query(
        self, expr: str, output: Sequence[str], limit: int | None
    ) -> milvus_pb2.QueryResults:
        params = [common_pb2.KeyValuePair(key="reduce_stop_for_best", value="False")]
        if self._able.ordered_by:
            params.append(common_pb2.KeyValuePair(key=self._able.ordered_by, value="False"))
        if limit is not None:
            params.append(common_pb2.KeyValuePair(key="limit", value=str(limit)))
        return await self._reads.query(
            milvus_pb2.QueryRequest(
                db_name=self._database,
                collection_name=self._collection,
                expr=expr,
                output_fields=output,
                partition_names=self._partitions,
                query_params=params,
                # Strong would wait for a fresh tick (up to 200 ms) at every page.
                consistency_level=common_pb2.Customized,
                guarantee_timestamp=self._guarantee_ts,
                use_default_consistency=False,
            )
        )
