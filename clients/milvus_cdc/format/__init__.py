"""The seam for formats: changes and schema changes as key, value and headers.

A format knows nothing of where its records go; Kafka and JSON lines use the same ones. Formats
register under the entry point group `milvus_cdc.formats`, see `milvus_cdc.sink.plugin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from milvus_cdc.rows import Changes, Table
from milvus_cdc.sink.writer import SchemaChange


@dataclass(slots=True)
class Record:
    """What one row, key or schema change becomes."""

    key: bytes | None
    value: bytes | None
    """None: a tombstone."""
    headers: tuple[tuple[str, bytes], ...] = ()
    """Those of the format itself; a sink adds its own, `content-type` among them."""


class Format(Protocol):
    """Configured once per task. `encode` may run in any thread, one collection's calls in order."""

    @property
    def content_type(self) -> str:
        """Media type of the values, for example `application/json`; a sink whose records have
        headers writes it as `content-type`.
        """
        ...

    async def prepare(self, table: Table, topic: str = "", schema_topic: str = "") -> None:
        """Before the first rows of a collection, and again when its name, its fields or its topic
        have changed: whatever takes a connection (registering a schema). `topic` is where its
        records go and `schema_topic` where its schema changes go, empty where there is none. Raises
        RetryableError or UserError.
        """
        ...

    def encode(self, table: Table, changes: Changes) -> list[Record]:
        """One record per row, or per key of a delete, in order. Raises RowRefusedError
        ROW_NOT_ENCODABLE when a value has no form in this format.
        """
        ...

    def encode_schema(self, change: SchemaChange | None, table: Table) -> Record:
        """A change of schema as an event; None for the collection's creation."""
        ...

    async def close(self) -> None: ...
