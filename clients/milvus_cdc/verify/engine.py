"""Compares one collection of a source with its counterpart at a sink, row by row and field by
field.

Through public read APIs only; loads nothing; bounded memory: two pages a side, at most
`_MAX_PENDING` differing keys. Collections without a partition key are compared partition by
partition, in key order.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from milvus_cdc.errors import UserError
from milvus_cdc.verify.connection import COLLECTION_NOT_FOUND, NOT_LOADED, Reads
from milvus_cdc.verify.doubles import doubled_keys
from milvus_cdc.verify.keys import INT64_MAX, Key
from milvus_cdc.verify.reader import Page, Side
from milvus_cdc.verify.report import (
    COMPARING,
    RECHECKING,
    CollectionResult,
    Difference,
    DifferenceKind,
    OnEvent,
    Progress,
    Target,
)
from milvus_cdc.verify.rows import Comparison, compare
from milvus_cdc.verify.settle import Patience, settle
from milvus_cdc.verify.shape import Shape, mismatch, shape_of

DEFAULT_MAX_DIFFERENCES = 10
_MAX_PENDING = 20_000
_PROGRESS_SECONDS = 0.5
_PARTITION_CHECKS = 6


async def verify_collection(
    source: Reads,
    sink: Reads,
    target: Target,
    *,
    max_differences: int = DEFAULT_MAX_DIFFERENCES,
    on_event: OnEvent,
    page_bytes: int = 4 * 2**20,
    patience_seconds: float = 10.0,
) -> CollectionResult:
    """The verdict on one collection; `on_event` gets progress and at most `max_differences` per
    kind.

    A collection that cannot be compared gets a `reason`: NOT_LOADED, COLLECTION_NOT_FOUND,
    SCHEMA_MISMATCH, PARTITION_MISMATCH. Raises RetryableError or UserError when a cluster cannot
    be asked.
    """
    run = _Run(source, sink, target, max_differences or DEFAULT_MAX_DIFFERENCES, on_event)
    run.page_bytes = page_bytes
    run.patience = Patience(patience_seconds)
    try:
        await run.whole()
    except UserError as err:
        if err.reason not in (NOT_LOADED, COLLECTION_NOT_FOUND):
            raise
        run.refuse(err.reason, err.message)
    return run.result


@dataclass(slots=True)
class _Run:
    source: Reads
    sink: Reads
    target: Target
    max_differences: int
    on_event: OnEvent
    page_bytes: int = 0
    patience: Patience = field(default_factory=Patience)
    result: CollectionResult = field(init=False)
    named: dict[DifferenceKind, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source_surplus: int = 0
    sink_surplus: int = 0
    moving: int = 0
    rows_total: int = 0
    reported_at: float = float("-inf")
    reported_phase: str = ""
    uncounted: list[str] = field(default_factory=list)
    """Sides that cannot count rows."""

    def __post_init__(self) -> None:
        self.result = CollectionResult(self.target.name)

    def refuse(self, reason: str, message: str) -> None:
        self.result.reason, self.result.message = reason, message
        self.result.equal = False

    async def progress(self, phase: str) -> None:
        now = time.monotonic()
        if phase == self.reported_phase and now - self.reported_at < _PROGRESS_SECONDS:
            return
        self.reported_at, self.reported_phase = now, phase
        await self.on_event(
            Progress(self.target.name, phase, self.result.rows_compared, self.rows_total)
        )

    async def whole(self) -> None:
        t = self.target
        ours = await self.source.describe(t.source_database, t.source_collection)
        theirs = await self.sink.describe(t.sink_database, t.sink_collection)
        if problem := mismatch(ours.schema, theirs.schema):
            self.refuse("SCHEMA_MISMATCH", f"{problem}; resync the collection")
            return
        if not await self._loaded("", ()):
            return
        shape = shape_of(ours.schema)
        partitions = [""] if shape.partition_key else await self._partitions()
        sides = []
        for partition in partitions:
            if not partition or await self._loaded(partition, (partition,)):
                sides.append((partition, *await self._sides(shape, partition)))
        for _, source, _ in sides:
            await source.refresh()
            if source.counts:
                self.rows_total += await source.count()
        await self.progress(COMPARING)
        for where, reads in (("source", self.source), ("sink", self.sink)):
            if not (able := await reads.capabilities()).count:
                self.uncounted.append(where)
                self.notes.append(
                    f"the {where} ({able.name}) cannot count rows: whether it holds keys twice was "
                    "not looked at (DOUBLES_NOT_PROVED)"
                )
        for partition, source, sink in sides:
            await _Partition(self, partition, shape, source, sink).compare()
        self._conclude()

    async def _loaded(self, partition: str, names: tuple[str, ...]) -> bool:
        t = self.target
        for where, reads, database, collection in (
            ("source", self.source, t.source_database, t.source_collection),
            ("sink", self.sink, t.sink_database, t.sink_collection),
        ):
            if not await reads.is_loaded(database, collection, names):
                what = f"partition {partition}" if partition else "the collection"
                self.refuse(NOT_LOADED, f"{what} is not loaded at the {where}; load it there first")
                return False
        return True

    async def _partitions(self) -> list[str]:
        """The partitions both sides have; a partition on its way gets some time to arrive."""
        t = self.target
        for check in range(_PARTITION_CHECKS):
            ours = await self.source.partitions(t.source_database, t.source_collection)
            theirs = await self.sink.partitions(t.sink_database, t.sink_collection)
            odd = sorted(set(ours) ^ set(theirs))
            delay = min(1.0, self.patience.seconds)
            if not odd or check == _PARTITION_CHECKS - 1 or delay <= 0:
                break
            self.patience.seconds -= delay
            await asyncio.sleep(delay)
        if odd:
            self.refuse("PARTITION_MISMATCH", f"only one side has partition {', '.join(odd[:10])}")
        return sorted(set(ours) & set(theirs))

    async def _sides(self, shape: Shape, partition: str) -> tuple[Side, Side]:
        t = self.target
        source_able = await self.source.capabilities()
        sink_able = await self.sink.capabilities()
        source, sink = (
            Side(
                reads,
                database=database,
                collection=collection,
                partition=partition,
                key=shape.key,
                fields=shape.fields,
                page_bytes=self.page_bytes,
                row_bytes=shape.row_bytes,
                capabilities=able,
            )
            for reads, database, collection, able in (
                (self.source, t.source_database, t.source_collection, source_able),
                (self.sink, t.sink_database, t.sink_collection, sink_able),
            )
        )
        return source, sink

    async def name(
        self, partition: str, kind: DifferenceKind, key: Key, fields: tuple[str, ...] = ()
    ) -> None:
        if self.left_to_name(kind) > 0:
            self.named[kind] = self.named.get(kind, 0) + 1
            await self.on_event(Difference(self.target.name, partition, kind, str(key), fields))

    def left_to_name(self, kind: DifferenceKind) -> int:
        return self.max_differences - self.named.get(kind, 0)

    def _conclude(self) -> None:
        result = self.result
        result.doubled = max(0, self.sink_surplus - self.source_surplus)
        result.source_doubled = self.source_surplus
        if self.source_surplus:
            self.notes.append(
                f"the source itself holds {self.source_surplus} surplus copies of keys"
                " (SOURCE_DUPLICATE_KEYS)"
            )
        if self.source_surplus > self.sink_surplus:
            self.notes.append(f"the sink holds {self.sink_surplus} surplus copies of them")
        if self.moving:
            self.notes.append(f"{self.moving} keys were still being written when patience ended")
        result.message = "; ".join([m for m in (result.message, *self.notes) if m])
        result.equal = (
            not result.reason
            and not result.missing
            and not result.extra
            and not result.different
            and ("sink" in self.uncounted or self.sink_surplus == self.source_surplus)
        )


@dataclass(slots=True)
class _Partition:
    run: _Run
    partition: str
    shape: Shape
    source: Side
    sink: Side
    pending: dict[Key, None] = field(default_factory=dict)
    source_hidden: bool = False
    sink_hidden: bool = False
    source_rows: int = 0
    """Seen, as in `sink_rows`."""
    sink_rows: int = 0

    async def compare(self) -> None:
        await asyncio.gather(self.source.refresh(), self.sink.refresh())
        pages = await self._pages(None)
        after: Key | None = None
        while True:
            ours, theirs = pages
            ends = [page.upto for page in pages if page.upto is not None]
            upto = min(ends) if ends else None
            # The next pages travel while these are compared.
            ahead = asyncio.create_task(self._pages(upto)) if upto is not None else None
            try:
                await self._compare_pages(after, ours, theirs, upto)
                if ahead is None:
                    break
                pages, after = await ahead, upto
            except BaseException:
                if ahead is not None:
                    ahead.cancel()
                    await asyncio.gather(ahead, return_exceptions=True)
                raise
        await self._settle()
        await self._compare_hidden()
        self.run.result.rows_source += await self._rows(self.source, self.source_rows)
        self.run.result.rows_sink += await self._rows(self.sink, self.sink_rows)

    async def _rows(self, side: Side, seen: int) -> int:
        return await side.count() if side.counts else seen

    async def _pages(self, after: Key | None) -> tuple[Page, Page]:
        limit = min(self.source.page_rows, self.sink.page_rows)
        ours, theirs = await asyncio.gather(
            self.source.page(after, limit), self.sink.page(after, limit)
        )
        return ours, theirs

    async def _compare_pages(
        self, after: Key | None, ours: Page, theirs: Page, upto: Key | None
    ) -> None:
        run = self.run
        source_rows = ours.rows if upto is None else ours.rows.upto(upto)
        sink_rows = theirs.rows if upto is None else theirs.rows.upto(upto)
        found = compare(source_rows, sink_rows, self.shape.fields)
        run.result.rows_compared += found.common
        self.source_rows += len(source_rows)
        self.sink_rows += len(sink_rows)
        for key in (*found.missing, *found.extra, *(key for key, _ in found.different)):
            self.pending[key] = None
        source_surplus, sink_surplus = ours.surplus, theirs.surplus
        if source_surplus and ours.upto != upto:
            source_surplus = await self.source.surplus(after, upto, len(source_rows))
        if sink_surplus and theirs.upto != upto:
            sink_surplus = await self.sink.surplus(after, upto, len(sink_rows))
        run.source_surplus += source_surplus
        run.sink_surplus += sink_surplus
        self.source_hidden |= ours.hidden_max_key
        self.sink_hidden |= theirs.hidden_max_key
        left = run.left_to_name(DifferenceKind.DOUBLED)
        if sink_surplus and left > 0:
            for key in await doubled_keys(self.source, self.sink, after, sink_rows, upto, left):
                await run.name(self.partition, DifferenceKind.DOUBLED, key)
        if len(self.pending) >= _MAX_PENDING:
            await self._settle()
        await run.progress(COMPARING)

    async def _settle(self) -> None:
        if not self.pending:
            return
        await self.run.progress(RECHECKING)

        async def on_round() -> None:
            await self.run.progress(RECHECKING)

        keys = list(self.pending)
        self.pending.clear()
        settled = await settle(
            self.source, self.sink, self.shape.fields, keys, self.run.patience, on_round
        )
        self.run.moving += settled.moving
        await self._report(settled.differences)

    async def _report(self, found: Comparison) -> None:
        run, result = self.run, self.run.result
        result.missing += len(found.missing)
        result.extra += len(found.extra)
        result.different += len(found.different)
        for key in found.missing:
            await run.name(self.partition, DifferenceKind.MISSING, key)
        for key in found.extra:
            await run.name(self.partition, DifferenceKind.EXTRA, key)
        for key, fields in found.different:
            await run.name(self.partition, DifferenceKind.DIFFERENT, key, fields)

    async def _compare_hidden(self) -> None:
        """The row with the largest int64 key cannot be read on some versions: its presence is
        compared."""
        if self.source_hidden and self.sink_hidden:
            self.run.notes.append(
                f"key {INT64_MAX} cannot be queried here: only its presence was compared"
            )
        elif self.source_hidden:
            await self._report(Comparison(missing=[INT64_MAX]))
        elif self.sink_hidden:
            await self._report(Comparison(extra=[INT64_MAX]))
