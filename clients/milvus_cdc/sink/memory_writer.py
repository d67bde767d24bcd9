"""A writer whose destination is this process' memory, for tests and benchmarks.

It is reached as any other sink by a package's entry point (`milvus_cdc.sink.plugin`); we register
none. Its destinations outlive the writers, as a server would, and can be made slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from milvus_cdc.errors import BugError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.rows import ChangeOp, Changes, Table
from milvus_cdc.sink.writer import (
    Batch,
    Capabilities,
    Checkpoint,
    Opened,
    Opening,
    SchemaChange,
    SchemaChangeKind,
)

Key = int | str


@dataclass
class Held:
    """One collection at a destination."""

    name: str
    epoch: int = 0
    rows: dict[Key, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Partition and row by key."""
    history: list[tuple[Key, dict[str, Any] | None]] = field(default_factory=list)
    """Every change that ever took effect; None: a delete."""
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)

    def take(self, table: Table, changes: Changes) -> None:
        name = table.key.name
        if changes.op is ChangeOp.DELETE:
            for row in changes.rows(table):
                key = row[name]
                self.history.append((key, None))
                there = self.rows.get(key)
                if there is not None and changes.partition in ("", there[0]):
                    del self.rows[key]
            return
        for row in changes.rows(table):
            self.history.append((row[name], row))
            self.rows[row[name]] = (changes.partition, row)


class MemoryDestination:
    """What writers of the same `destination` share."""

    def __init__(self) -> None:
        self.collections: dict[tuple[str, int], Held] = {}
        self.answers = asyncio.Event()
        self.answers.set()

    def held(self, table: Table) -> Held | None:
        return self.collections.get((table.task_uid, table.collection_id))

    @contextlib.asynccontextmanager
    async def stalled(self) -> AsyncIterator[None]:
        """Nothing is answered meanwhile."""
        self.answers.clear()
        try:
            yield
        finally:
            self.answers.set()


DESTINATIONS: dict[str, MemoryDestination] = {}


class MemoryWriter:
    """See `milvus_cdc.sink.writer.Writer`."""

    CONFIG_SCHEMA: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {
            "destination": {"type": "string", "minLength": 1},
            "own_checkpoint": {"type": "boolean"},
        },
        "required": ["destination"],
        "additionalProperties": False,
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._there = DESTINATIONS.setdefault(config["destination"], MemoryDestination())
        own = bool(config.get("own_checkpoint", False))
        self._capabilities = Capabilities(own_checkpoint=own, in_flight=1 if own else 4)
        self._epochs: dict[tuple[str, int], int] = {}

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def probe(self) -> str:
        return "memory"

    def violations(self, tables: Sequence[Table]) -> list[str]:
        return []

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        collections, key = self._there.collections, _key(table)
        held = collections.get(key)
        if opening is Opening.RESUME and held is None:
            raise UserError("SINK_COLLECTION_MISSING", f"{table.full_name} is not here; resync it")
        if opening is Opening.NEW:
            for other, each in collections.items():
                if other != key and each.name == table.full_name and each.rows:
                    raise UserError("COLLECTION_EXISTS", f"{table.full_name} is another's here")
        if held is None or opening is Opening.RECREATE:
            held = collections[key] = Held(table.full_name, held.epoch if held is not None else 0)
        self._check(table, held, epoch)
        held.epoch = epoch
        self._epochs[key] = epoch
        if not self._capabilities.own_checkpoint:
            return Opened()
        return Opened(tuple(held.checkpoints.values()))

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        await self._answer(timeout_seconds)
        key = _key(change.table)
        held = self._there.collections.get(key)
        if held is None:
            return
        self._check(change.table, held, self._epochs.get(key, held.epoch))
        match change.kind:
            case SchemaChangeKind.DROP_COLLECTION:
                del self._there.collections[key]
            case SchemaChangeKind.RENAME_COLLECTION:
                held.name = change.table.full_name
            case SchemaChangeKind.DROP_PARTITION:
                held.rows = {k: v for k, v in held.rows.items() if v[0] != change.partition}

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        epoch = self._epochs.get(_key(table))
        if epoch is None:
            raise BugError("NOT_OPEN", f"{table.full_name} is written before it is opened")
        await self._answer(timeout_seconds)
        held = self._there.held(table)
        if held is None:
            raise UserError("SINK_COLLECTION_MISSING", f"{table.full_name} is gone; resync it")
        self._check(table, held, epoch)
        # No await from here on: all or nothing.
        for changes in batch.changes:
            known = held.checkpoints.get(changes.vchannel)
            if known is None or changes.ts > known.resolved_ts:
                held.take(table, changes)
        if self._capabilities.own_checkpoint:
            held.checkpoints |= {each.vchannel: each for each in batch.checkpoints}

    async def heartbeat(self, table: Table, resolved_ts: int) -> None:
        """Checkpoints tell it."""

    async def release(self, table: Table) -> None:
        self._epochs.pop(_key(table), None)

    async def close(self) -> None:
        self._epochs.clear()

    async def _answer(self, timeout_seconds: float) -> None:
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._there.answers.wait()
                await asyncio.sleep(0)
        except TimeoutError:
            raise UnknownOutcomeError("SINK_TIMEOUT", "no answer in time") from None

    def _check(self, table: Table, held: Held, epoch: int) -> None:
        if self._capabilities.own_checkpoint and held.epoch > epoch:
            raise RetryableError(
                "SINK_FENCED", f"{table.full_name} has an owner of epoch {held.epoch}"
            )


def _key(table: Table) -> tuple[str, int]:
    return table.task_uid, table.collection_id
