"""The file sink's `Writer`: what a task says of it, threads and deadlines around `publishing`.

Laws: everything that blocks runs in the writer's own threads, one call per collection at a time. A
call that has outlived its deadline is UnknownOutcomeError; its thread goes on, and the next call
for the collection waits for its end first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import structlog
from milvuscdc.v1 import sink_file_pb2

from milvus_cdc.errors import BugError, CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.rows import Changes, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files import encode
from milvus_cdc.sink.files.chain import locate
from milvus_cdc.sink.files.opening import open_store_of
from milvus_cdc.sink.files.orphans import remove_orphans
from milvus_cdc.sink.files.publishing import Published
from milvus_cdc.sink.files.store import Bytes
from milvus_cdc.sink.writer import (
    Batch,
    Capabilities,
    Opened,
    Opening,
    SchemaChange,
    SchemaChangeKind,
)

log = structlog.get_logger(__name__)

_ROTATE_BYTES = 32 * 2**20
"""Half of what a replicator holds by default."""
_ROTATE_SECONDS = 60.0
_ROWS_PER_FILE = 1_000_000
_OPEN_SECONDS = 120.0
_TELL_SECONDS = 20.0
_THREADS = 8
_QUIET_INTERVALS = 10
"""After so many rotation intervals without rows a manifest says that nothing happened."""
_T = TypeVar("_T")


@dataclass(slots=True)
class _Collection:
    published: Published | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    running: Future[object] | None = None
    """A call that outlived its deadline."""


class FileWriter:
    """See `milvus_cdc.sink.writer.Writer`, and docs/files.md for what readers find."""

    def __init__(self, spec: sink_file_pb2.FileSink, secrets: SecretResolver) -> None:
        """No I/O. Raises UserError for a secret, a URI or a format that cannot be used."""
        self._store = open_store_of(spec, secrets, "sink.files")
        self._files: encode.Parquet | encode.JsonLines
        if spec.WhichOneof("files") == "json_lines":
            from milvus_cdc.format.registry import open_format

            lines = spec.json_lines
            records = open_format(lines.format, secrets, "sink.files.json_lines.format")
            self._files = encode.JsonLines(records, compress=lines.gzip)
        else:
            self._files = encode.Parquet(spec.parquet)
        seconds = spec.rotate_interval.ToTimedelta().total_seconds()
        self._capabilities = Capabilities(
            own_checkpoint=True,
            rows_per_batch=_ROWS_PER_FILE,
            bytes_per_batch=spec.rotate_bytes or _ROTATE_BYTES,
            linger_seconds=seconds if spec.HasField("rotate_interval") else _ROTATE_SECONDS,
            in_flight=1,
            heartbeats=True,
        )
        self._quiet_seconds = _QUIET_INTERVALS * self._capabilities.linger_seconds
        self._telling: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "files")
        self._collections: dict[tuple[str, int], _Collection] = {}

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def probe(self) -> str:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._store.probe)

    def violations(self, tables: Sequence[Table]) -> list[str]:
        return [
            f"{table.full_name}: the field {each.name!r} has the name of a column that the files "
            "have themselves; rename it at the source, or exclude the collection"
            for table in tables
            for each in table.fields
            if each.name in encode.RESERVED
        ]

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        for text in self.violations([table]):
            raise UserError("UNSUPPORTED_BY_SINK", text)
        if isinstance(self._files, encode.JsonLines):
            await self._files.prepare(table)

        def work() -> tuple[Published, tuple[tuple[str, str], ...]]:
            published = Published.open(self._store, table, opening, epoch, self._files.suffix)
            left = remove_orphans(self._store, published.folder, published.chain, published.head)
            return published, left + self._store.conditions()

        collection = self._collection(table)
        collection.published = None
        published, conditions = await self._run(collection, work, _OPEN_SECONDS)
        collection.published = published
        return Opened(published.head.checkpoints, conditions)

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        collection = self._collection(table)
        published = collection.published
        if published is None:
            raise BugError("NOT_OPEN", f"{table.full_name} is written before it is opened")
        deadline = time.monotonic() + timeout_seconds

        def content(changes: list[Changes]) -> Bytes:
            return self._files.content(table, changes)

        await self._run(
            collection, lambda: published.write(table, batch, content, deadline), timeout_seconds
        )

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        collection, table = self._collection(change.table), change.table

        def work() -> None:
            published = collection.published or self._unopened(change)
            if published is not None:
                published.apply(change)
            elif change.kind is not SchemaChangeKind.DROP_COLLECTION:
                raise UserError(
                    "SINK_COLLECTION_MISSING",
                    f"the files of {table.full_name} are not below {self._store.uri}; bring them "
                    "back (is it mounted?), or resync the collection",
                    field="sink.files.uri",
                )

        await self._run(collection, work, timeout_seconds)

    def _unopened(self, change: SchemaChange) -> Published | None:
        table = change.table
        for database, name in ((table.database, table.collection), change.renamed_from):
            folder = locate(self._store, database, name, table.collection_id) if name else None
            if folder is not None:
                return Published.as_it_is(self._store, folder, table, self._files.suffix)
        return None

    async def heartbeat(self, table: Table, resolved_ts: int) -> None:
        """The next manifest says so, and one without rows where none came for long."""
        collection = self._collection(table)
        published = collection.published
        if published is None:
            return
        published.told_ts = max(published.told_ts, resolved_ts)
        quiet = time.monotonic() - published.published_at
        if quiet >= self._quiet_seconds and not collection.lock.locked():
            published.published_at = time.monotonic()
            task = asyncio.create_task(self._tell(collection, published))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, collection: _Collection, published: Published) -> None:
        try:
            await self._run(collection, published.tell, _TELL_SECONDS)
        except CdcError as error:
            # Whatever it is, the next rows will say it to somebody.
            log.info("time not published", folder=published.folder, error=str(error))

    async def release(self, table: Table) -> None:
        """What is published needs no end; a call that is still running ends on its own."""
        self._collection(table).published = None

    async def close(self) -> None:
        for task in self._telling:
            task.cancel()
        if isinstance(self._files, encode.JsonLines):
            await self._files.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    def _collection(self, table: Table) -> _Collection:
        return self._collections.setdefault((table.task_uid, table.collection_id), _Collection())

    async def _run(self, collection: _Collection, work: Callable[[], _T], seconds: float) -> _T:
        deadline = time.monotonic() + seconds
        async with collection.lock:
            if collection.running is not None:
                await _until(collection.running, deadline)
                collection.running = None
            future = self._threads.submit(work)
            try:
                await _until(future, deadline)
            except (UnknownOutcomeError, asyncio.CancelledError) as error:
                if not future.cancel():
                    collection.running = future  # type: ignore[assignment]
                elif isinstance(error, UnknownOutcomeError):
                    raise RetryableError(
                        "SINK_BUSY", "the file store is slow: no thread was free in time"
                    ) from None
                raise
            return future.result()


async def _until(future: Future[_T], deadline: float) -> None:
    """Waits for its end, whatever it is. Raises UnknownOutcomeError at the deadline."""
    waiting = asyncio.wrap_future(future)
    # Cancelling the waiter must not cancel a call that has not begun yet and be taken for its end.
    done, _ = await asyncio.wait({waiting}, timeout=max(0.0, deadline - time.monotonic()))
    if not done:
        waiting.add_done_callback(_seen)
        raise UnknownOutcomeError(
            "SINK_TIMEOUT", "no answer from the file store in time; it is looked up before the next"
        )
    _seen(waiting)


def _seen(waiting: asyncio.Future[_T]) -> None:
    """An error is looked at where the result is asked for."""
    if not waiting.cancelled():
        waiting.exception()
