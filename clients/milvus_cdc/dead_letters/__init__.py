"""Rows that a sink will never take, each as one JSON object with the reason, at a place of the
user's choice.

Laws: `put` returns only when the letters are durable. A letter may be put again after a crash.
Whatever the place is, its errors name fields below `dead_letters`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from milvus_cdc.model import ms_to_text, tso_to_ms
from milvus_cdc.rows import Changes, Table

FIELD = "dead_letters"


@dataclass(frozen=True, slots=True)
class Letter:
    """One refused row."""

    table: Table
    key: bytes
    """The primary key as JSON."""
    fields: dict[str, object]
    """What is known of it, the row itself aside."""
    row: bytes
    """In flat JSON."""

    def encode(self, *, with_row: bool = True) -> bytes:
        if with_row:
            return orjson.dumps({**self.fields, "row": orjson.Fragment(self.row)})
        note = {"row": None, "row_left_out": f"its {len(self.row)} bytes are too large here"}
        return orjson.dumps({**self.fields, **note})


def letters_of(table: Table, changes: Changes, reason: str, message: str) -> list[Letter]:
    """One of each row."""
    # With it comes Arrow, which who has no letters to write does without.
    from milvus_cdc.format.flat_json import FlatJson

    now = ms_to_text(time.time_ns() // 1_000_000)
    records = FlatJson().encode(table, changes)
    keys = (orjson.dumps(key) for key in changes.arrow(table).column(table.key.name).to_pylist())
    return [
        Letter(
            table,
            key,
            {
                "task": table.task,
                "database": table.source_database,
                "collection": table.source_collection,
                "sink_database": table.database,
                "sink_collection": table.collection,
                "key": orjson.Fragment(key),
                "op": changes.op.value,
                "ts": changes.ts,
                "ts_ms": tso_to_ms(changes.ts),
                "vchannel": changes.vchannel,
                "partition": changes.partition,
                "reason": reason,
                "message": message,
                "time": now,
            },
            record.value or b"null",
        )
        for key, record in zip(keys, records, strict=True)
    ]


class Place(Protocol):
    async def probe(self) -> str:
        """Connects, and says for a person what it is; raises what is wrong with it."""
        ...

    async def put(self, letters: Sequence[Letter], timeout_seconds: float) -> None:
        """Durable when it returns. Raises RetryableError, or UserError for what only a person can
        mend.
        """
        ...

    async def close(self) -> None: ...
