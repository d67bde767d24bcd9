"""One batch into one table, within the transaction of its caller.

Rows that likely are not in the table yet go into it by COPY; when one is, and rows that replace
others, by COPY into a temporary table and a merge. The temporary table stays with its connection:
collections of the same shape share it, and it is empty after each transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql
from psycopg.adapt import Dumper

from milvus_cdc.errors import RowRefusedError
from milvus_cdc.rows import Field, FieldType, Table
from milvus_cdc.sink.postgres import copying, failures, tables
from milvus_cdc.sink.postgres.columns import PARTITION_COLUMN, TS_COLUMN, Column
from milvus_cdc.sink.postgres.connections import Transaction
from milvus_cdc.sink.postgres.ledger import Name, quoted
from milvus_cdc.sink.postgres.reduction import Reduced
from milvus_cdc.sink.postgres.settings import FIELD, Settings

SLICE_BYTES = 4 * 1024 * 1024
"""About as much is encoded while as much is being sent."""
SHOWN_KEY = 100
"""Characters of a key in a message."""
KEPT_STAGES = 8
"""Temporary tables of one connection."""


@dataclass(frozen=True, slots=True)
class _Int8Array:
    """A parameter that is in binary form already."""

    data: bytes


class _TextArray(_Int8Array):
    pass


class _Int8ArrayDumper(Dumper):
    format = psycopg.pq.Format.BINARY
    oid = psycopg.adapters.types["int8"].array_oid

    def dump(self, obj: _Int8Array) -> bytes:
        return obj.data


class _TextArrayDumper(_Int8ArrayDumper):
    oid = psycopg.adapters.types["text"].array_oid


psycopg.adapters.register_dumper(_Int8Array, _Int8ArrayDumper)
psycopg.adapters.register_dumper(_TextArray, _TextArrayDumper)


class Merger:
    """Writes batches of one collection; `name` is that of its table."""

    def __init__(self, table: Table, columns: Sequence[Column], settings: Settings) -> None:
        self._table = table
        self._columns = tuple(columns)
        ours = (
            Field(0, PARTITION_COLUMN, FieldType.VARCHAR),
            Field(0, TS_COLUMN, FieldType.INT64),
        )
        self._encoders = [
            copying.Encoder(field, sparsevec=settings.sparsevec, strip_nul=settings.strip_nul)
            for field in (*table.fields, *ours)
        ]
        self._collided = 0
        """Inserts of keys that were there: so many of the next batches are merged at once."""

    async def write(self, t: Transaction, name: Name, reduced: Reduced) -> None:
        """Raises UserError ROW_NOT_STORABLE naming key and field."""
        for partition, keys in reduced.deletes.items():
            await self._delete(t, name, partition, keys)
        if not reduced.rows.num_rows:
            return
        if reduced.fresh and not self._collided:
            await t.execute("SAVEPOINT fresh")
            try:
                await self._copy(t, quoted(name), reduced.rows)
                return
            except psycopg.errors.UniqueViolation:
                # Milvus takes an insert of a key that exists; the later row counts.
                await t.execute("ROLLBACK TO SAVEPOINT fresh")
                self._collided = 100
        self._collided = max(0, self._collided - 1)
        await self._merge(t, name, reduced.rows)

    async def _delete(self, t: Transaction, name: Name, partition: str, keys: pa.Array) -> None:
        data = await asyncio.to_thread(copying.array_parameter, keys)
        array = (_TextArray if pa.types.is_string(keys.type) else _Int8Array)(data)
        condition = sql.SQL(" AND coalesce({}, '') IN ('', %s)").format(
            sql.Identifier(PARTITION_COLUMN)
        )
        await t.execute(
            sql.SQL("DELETE FROM {} WHERE {} = ANY(%s){}").format(
                quoted(name),
                sql.Identifier(self._table.key.name),
                condition if partition else sql.SQL(""),
            ),
            (array, partition) if partition else (array,),
        )

    async def _merge(self, t: Transaction, name: Name, rows: pa.RecordBatch) -> None:
        stage = await self._stage(t)
        await self._copy(t, stage, rows)
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in self._columns)
        key = self._table.key.name
        changed = [sql.Identifier(c.name) for c in self._columns if c.name != key]
        query = sql.SQL(
            "INSERT INTO {} ({}) SELECT {} FROM {} ON CONFLICT ({}) DO UPDATE SET {}"
        ).format(
            quoted(name),
            names,
            names,
            stage,
            sql.Identifier(key),
            sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(each) for each in changed),
        )
        try:
            await t.execute(query)
        except psycopg.errors.ProgramLimitExceeded as error:
            if self._table.key.type is not FieldType.VARCHAR:
                raise
            # Too long for the key's index: one of them is, so the longest is.
            longest = pc.index(lengths := pc.binary_length(rows.column(key)), pc.max(lengths))
            raise self._refused(rows, longest.as_py(), key, error) from error

    async def _stage(self, t: Transaction) -> sql.Identifier:
        shape = repr(self._columns).encode()
        name = f"milvus_cdc_{hashlib.sha256(shape).hexdigest()[:32]}"
        stage = sql.Identifier("pg_temp", name)
        if name in t.session.stages:
            return stage
        kinds = await tables.types(t, self._columns)
        while len(t.session.stages) >= KEPT_STAGES:
            oldest = t.session.stages.pop(0)
            await t.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier("pg_temp", oldest)))
        await t.execute(
            sql.SQL("CREATE TEMPORARY TABLE {} ({}) ON COMMIT DELETE ROWS").format(
                sql.Identifier(name),
                sql.SQL(", ").join(
                    sql.SQL("{} {}").format(sql.Identifier(column.name), kind)
                    for column, kind in zip(self._columns, kinds, strict=True)
                ),
            )
        )
        t.session.stages.append(name)
        return stage

    async def _copy(self, t: Transaction, into: sql.Composable, rows: pa.RecordBatch) -> None:
        per_slice = _rows_per_slice(rows)
        step: asyncio.Task[tuple[list[str], pa.Buffer]] | None = None
        try:
            # The order of columns can differ from slice to slice, so the first decides for all.
            names, data = await asyncio.to_thread(self._encode, rows.slice(0, per_slice), None)
            query = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
                into, sql.SQL(", ").join(map(sql.Identifier, names))
            )
            async with t.cursor.copy(query) as copy:
                await copy.write(copying.HEADER)
                for begin in range(per_slice, rows.num_rows + per_slice, per_slice):
                    if begin < rows.num_rows:
                        part = rows.slice(begin, per_slice)
                        step = asyncio.create_task(asyncio.to_thread(self._encode, part, names))
                    await copy.write(memoryview(data))
                    if step is not None:
                        _, data = await step
                        step = None
                await copy.write(copying.TRAILER)
        except psycopg.Error as error:
            if step is not None:
                await asyncio.wait({step})
            if (found := failures.copied_line(error)) is None or not failures.is_data_error(error):
                raise
            raise self._refused(rows, *found, error) from error

    def _encode(
        self, rows: pa.RecordBatch, order: Sequence[str] | None
    ) -> tuple[list[str], pa.Buffer]:
        cells = [
            (encoder.name, encoder.parts(column))
            for encoder, column in zip(self._encoders, rows.columns, strict=True)
        ]
        return copying.rows(cells, rows.num_rows, order)

    def _refused(
        self, rows: pa.RecordBatch, row: int, column: str, error: psycopg.Error
    ) -> Exception:
        if isinstance(error, psycopg.errors.UniqueViolation) or row >= rows.num_rows:
            return error
        value = rows.column(self._table.key.name)[row].as_py()
        key = repr(value)
        if len(key) > SHOWN_KEY:
            key = f"{key[:SHOWN_KEY]}... ({len(key)} characters)"
        field = f", field {column}" if column else ""
        return RowRefusedError(
            "ROW_NOT_STORABLE",
            f"{self._table.full_name}: the row with key {key}{field} cannot be held: "
            f"{error.diag.message_primary}; change or delete it at the source and resync the "
            f"collection{_advice(error)}",
            key=value,
            field=FIELD,
        )


def _advice(error: psycopg.Error) -> str:
    if error.sqlstate in ("22021", "22P05"):
        return f", or set {FIELD}.nul_characters to strip"
    return ""


def _rows_per_slice(rows: pa.RecordBatch) -> int:
    size = max(1, rows.nbytes // max(1, rows.num_rows))
    return max(1, int(SLICE_BYTES // size))
