"""One collection's files as their owner writes them: opening, rows, schema changes. Blocking calls.

Laws: what is published follows from manifests alone. What is at or below its vchannel's checkpoint,
or among the changes beyond it that a manifest counts as written, was published before and is left
out: a replay changes nothing. An attempt whose outcome is unknown is looked up before the next one;
its file names are never used again.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import orjson
import structlog

from milvus_cdc.errors import BugError, CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.sink.files import encode, manifest, places, schema_file
from milvus_cdc.sink.files.chain import FOLD, Chain, locate
from milvus_cdc.sink.files.manifest import Event, FileEntry, Manifest, Shard
from milvus_cdc.sink.files.store import URI_FIELD, Bytes, MissingError, Store
from milvus_cdc.sink.writer import Batch, Opening, SchemaChange, SchemaChangeKind

log = structlog.get_logger(__name__)

Content = Callable[[list[Changes]], Bytes]
_OPENING_TRIES = 20


@dataclass(slots=True)
class Published:
    """A collection that this process has opened."""

    store: Store
    folder: str
    epoch: int
    writer: str
    chain: Chain
    head: Manifest
    suffix: str
    schema_of: tuple[Table, str] | None = None
    """The schema's hash of the table that came last."""
    uncertain: bool = False
    """An attempt may have been published; look first."""
    told_ts: int = 0
    """See `manifest.Manifest.told_ts`."""
    published_at: float = field(default_factory=time.monotonic)
    doubtful: list[str] = field(default_factory=list)
    """Files of such attempts, until it is known that no manifest will name them."""

    @classmethod
    def open(
        cls, store: Store, table: Table, opening: Opening, epoch: int, suffix: str
    ) -> Published:
        """Publishes a manifest of this epoch, after which nobody with an older view can commit."""
        folder = locate(store, table.database, table.collection, table.collection_id)
        if folder is None and opening is Opening.RESUME:
            raise UserError(
                "SINK_COLLECTION_MISSING",
                f"the files of {table.full_name} (collection {table.collection_id}) are not below "
                f"{store.uri} any more; bring them back (is it mounted?), or resync the collection",
                field=URI_FIELD,
            )
        folder = folder or places.collection_folder(
            table.database, table.collection, table.collection_id
        )
        chain, writer = Chain(store, folder), uuid.uuid4().hex[:12]
        for _ in range(_OPENING_TRIES):
            head = chain.newest()
            if head is not None:
                _check_owner(store, table, head, opening, epoch)
            opened = cls(store, folder, epoch, writer, chain, manifest.before_first(table), suffix)
            link = opened._opening_link(head, table, opening)
            if chain.publish(link):
                opened.head = link
                return opened
        raise RetryableError("SINK_BUSY", f"others publish below {store.uri}/{folder} all the time")

    @classmethod
    def as_it_is(cls, store: Store, folder: str, table: Table, suffix: str) -> Published | None:
        """For a change by whoever did not open it: a drop that outlived its owner."""
        chain = Chain(store, folder)
        head = chain.newest()
        if head is None or head.task_uid != table.task_uid:
            return None
        return cls(store, folder, head.epoch, head.writer, chain, head, suffix)

    def _opening_link(self, head: Manifest | None, table: Table, opening: Opening) -> Manifest:
        begins = (
            head is None
            or (opening is Opening.RECREATE and not (head.epoch == self.epoch and _is_empty(head)))
            or (opening is Opening.NEW and head.task_uid != table.task_uid)
        )
        base = head or manifest.before_first(table)
        link = base.succeed(manifest.OPEN, self.epoch, self.writer, _attempt(), _now_ms())
        if begins:
            link = replace(
                manifest.before_first(table),
                number=link.number,
                epoch=link.epoch,
                writer=link.writer,
                attempt=link.attempt,
                time_ms=link.time_ms,
                generation=base.generation + 1,
                generation_from=link.number,
            )
        return replace(
            link,
            task=table.task,
            task_uid=table.task_uid,
            database=table.database,
            collection=table.collection,
            schema=self._schema(table, link.schema),
        )

    # ---- rows

    def write(self, table: Table, batch: Batch, content: Content, deadline: float) -> None:
        """Publishes the batch; returns when its manifest is there, or nothing was new."""
        for _ in range(3):
            self._look_again()
            changes = [each for each in batch.changes if self._is_fresh(each)]
            link = self._next(manifest.WRITE).with_checkpoints(batch.checkpoints)
            if not changes and link.shards == self.head.shards:
                return
            link = replace(link, schema=self._schema(table, self.head.schema))
            files: list[FileEntry] = []
            done = False
            try:
                self._put_files(link, changes, content, deadline, files)
                link = _with_rows(link, changes, tuple(files))
                self._check_time(deadline)
                done = self._publish(link)
            finally:
                if self.uncertain:
                    self.doubtful += [each.path for each in files]
                elif not done:
                    self._remove([each.path for each in files])
            if done:
                self._fold()
                return
        raise RetryableError("SINK_BUSY", f"{self.folder}: earlier attempts keep arriving")

    def _is_fresh(self, changes: Changes) -> bool:
        """It has rows, and they are not published yet."""
        held = self.head.shards.get(changes.vchannel)
        if held is None or not changes.num_rows:
            return changes.num_rows > 0
        return changes.ts > held.resolved_ts and _identity(changes) not in held.written

    def _put_files(
        self,
        link: Manifest,
        changes: list[Changes],
        content: Content,
        deadline: float,
        files: list[FileEntry],
    ) -> None:
        """Adds to `files` each one before it is written."""
        for index, each in enumerate(encode.encode(changes, content)):
            self._check_time(deadline)
            path = places.part_path(
                link.generation, each.day, link.number, link.epoch, link.attempt, index, self.suffix
            )
            files.append(
                FileEntry(
                    path=path,
                    rows=each.rows,
                    deletes=each.deletes,
                    bytes=memoryview(each.data).nbytes,
                    min_ts=each.min_ts,
                    max_ts=each.max_ts,
                    sha256=each.sha256(),
                )
            )
            self.store.put(f"{self.folder}/{path}", each.data)

    def _remove(self, paths: list[str]) -> None:
        """What cannot be removed now, the next opening removes."""
        if paths:
            with contextlib.suppress(CdcError):
                self.store.remove([f"{self.folder}/{path}" for path in paths])

    # ---- schema changes

    def apply(self, change: SchemaChange) -> None:
        """Publishes the event, unless it is in the state already."""
        for _ in range(3):
            self._look_again()
            link = self._applied(change)
            if link is None or self._publish(link):
                return
        raise RetryableError("SINK_BUSY", f"{self.folder}: earlier attempts keep arriving")

    def _applied(self, change: SchemaChange) -> Manifest | None:
        head, table = self.head, change.table
        link = self._next(manifest.SCHEMA)
        ts = change.ts or max(head.newest_ts, self.told_ts)
        name = change.partition
        match change.kind:
            case SchemaChangeKind.DROP_COLLECTION:
                if head.dropped:
                    return None
                return replace(link, dropped=True, events=(Event(change.kind, ts),))
            case SchemaChangeKind.RENAME_COLLECTION:
                if (head.database, head.collection) == (table.database, table.collection):
                    return None
                self._leave_location(table)
                event = Event(change.kind, ts, database=table.database, collection=table.collection)
                return replace(
                    link, database=table.database, collection=table.collection, events=(event,)
                )
            case SchemaChangeKind.CREATE_PARTITION:
                if name in head.partitions:
                    return None
                link = _with_partitions(link, {name})
                return replace(link, events=(Event(change.kind, ts, name),))
            case SchemaChangeKind.DROP_PARTITION:
                if name in head.dropped_partitions:
                    return None
                return replace(
                    link,
                    partitions=tuple(each for each in head.partitions if each != name),
                    dropped_partitions=(*head.dropped_partitions, name),
                    events=(Event(change.kind, ts, name),),
                )
        raise BugError("UNKNOWN_SCHEMA_CHANGE", f"{change.kind} of {table.full_name}")

    def _leave_location(self, table: Table) -> None:
        """Whoever knows the new name alone finds the folder of the old one."""
        new = places.collection_folder(table.database, table.collection, table.collection_id)
        if new != self.folder:
            self.store.put(
                f"{new}/{places.LOCATION}", orjson.dumps({"folder": self.folder}) + b"\n"
            )

    # ---- time

    def tell(self) -> None:
        """Publishes that nothing happened up to `told_ts`, where readers do not know it yet."""
        self._look_again()
        if self.told_ts > self.head.complete_ts:
            self._publish(self._next(manifest.WRITE))

    # ---- links

    def _next(self, kind: str) -> Manifest:
        link = self.head.succeed(kind, self.epoch, self.writer, _attempt(), _now_ms())
        return replace(link, told_ts=max(self.told_ts, link.told_ts))

    def _publish(self, link: Manifest) -> bool:
        """False when an earlier attempt of ours turned out to be there: begin anew."""
        try:
            published = self.chain.publish(link)
        except BaseException as error:
            # Whatever else it was, the manifest may be there, and its files must stay.
            self.uncertain = isinstance(error, UnknownOutcomeError) or not isinstance(
                error, CdcError
            )
            raise
        self.published_at = time.monotonic()
        if published:
            self.head = link
            # Their number is taken, so they stay what they are.
            self._remove(self.doubtful)
            self.doubtful = []
            return True
        there = self._newest()
        if there.attempt == link.attempt:
            # The request came twice; the first one is what made the second fail.
            self.head = there
            return True
        return False

    def _look_again(self) -> None:
        if self.uncertain:
            self._newest()
            self.uncertain = False

    def _newest(self) -> Manifest:
        """Takes the newest manifest for the state. Raises SINK_FENCED unless it is ours."""
        there = self.chain.newest()
        if there is None:
            raise UserError(
                "SINK_COLLECTION_MISSING",
                f"the manifests of {self.store.uri}/{self.folder} are gone; bring them back, or "
                "resync the collection",
                field=URI_FIELD,
            )
        if there.writer != self.writer:
            raise RetryableError(
                "SINK_FENCED",
                f"{self.store.uri}/{self.folder} has a new owner (manifest {there.number}, epoch "
                f"{there.epoch}, ours is {self.epoch}); this one writes no more",
                field=URI_FIELD,
            )
        self.head = there
        named = {each.path for each in there.files}
        self.doubtful = [path for path in self.doubtful if path not in named]
        return there

    def _schema(self, table: Table, held: str) -> str:
        if self.schema_of is not None and self.schema_of[0] is table:
            return self.schema_of[1]
        digest, data = schema_file.dump(table)
        if digest != held:
            self.store.put(f"{self.folder}/{places.schema_path(digest)}", data)
        self.schema_of = (table, digest)
        return digest

    def _fold(self) -> None:
        if self.head.number % FOLD == 0:
            try:
                self.chain.fold()
            except (CdcError, MissingError) as error:
                # The next hundred will try again; everything is published as it is.
                log.warning("manifests not folded", folder=self.folder, error=str(error))

    def _check_time(self, deadline: float) -> None:
        if time.monotonic() >= deadline:
            raise RetryableError(
                "SINK_TIMEOUT",
                f"{self.store.uri}/{self.folder}: no time left to publish; nothing is published",
            )


def _check_owner(store: Store, table: Table, head: Manifest, opening: Opening, epoch: int) -> None:
    ours = head.task_uid == table.task_uid
    if opening is Opening.NEW and not ours and head.rows:
        raise UserError(
            "COLLECTION_EXISTS",
            f"{store.uri} holds files of {table.full_name} (collection {table.collection_id}) from "
            f"another task ({head.task or head.task_uid or 'unnamed'}); choose another folder, "
            "remove them, or create the task with adoptExisting: true",
            field=URI_FIELD,
        )
    if opening is Opening.RESUME and not ours:
        raise UserError(
            "SINK_COLLECTION_REPLACED",
            f"the files of {table.full_name} below {store.uri} belong to another task by now "
            f"({head.task or head.task_uid}); give each task a folder of its own",
            field=URI_FIELD,
        )
    if ours and head.epoch > epoch:
        raise RetryableError(
            "SINK_FENCED",
            f"{table.full_name} below {store.uri} was opened with epoch {head.epoch}, this is "
            f"{epoch}: another process owns it by now",
            field=URI_FIELD,
        )


def _is_empty(head: Manifest) -> bool:
    return not head.rows and not head.shards and head.number == head.generation_from


def _with_rows(link: Manifest, changes: list[Changes], files: tuple[FileEntry, ...]) -> Manifest:
    shards = dict(link.shards)
    written: dict[str, list[str]] = {}
    for each in changes:
        held = shards.get(each.vchannel, Shard("", 0))
        shards[each.vchannel] = replace(held, written_ts=max(held.written_ts, each.ts))
        if each.ts > held.resolved_ts:
            written.setdefault(each.vchannel, []).append(_identity(each))
    for vchannel, identities in written.items():
        held = shards[vchannel]
        shards[vchannel] = replace(held, written=(*held.written, *identities))
    link = replace(
        link, shards=shards, files=files, rows=link.rows + sum(each.rows for each in files)
    )
    named = {each.partition for each in changes if each.op is not ChangeOp.DELETE}
    return _with_partitions(link, named - {""})


def _with_partitions(link: Manifest, names: set[str]) -> Manifest:
    if names <= set(link.partitions) and names.isdisjoint(link.dropped_partitions):
        return link
    return replace(
        link,
        partitions=tuple(sorted({*link.partitions, *names})),
        dropped_partitions=tuple(each for each in link.dropped_partitions if each not in names),
    )


def _identity(changes: Changes) -> str:
    """Of a request in its vchannel; see `manifest.Shard.written`."""
    kind = "-" if changes.op is ChangeOp.DELETE else ""
    return f"{changes.ts}.{changes.order}{kind}"


def _attempt() -> str:
    return uuid.uuid4().hex[:12]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
