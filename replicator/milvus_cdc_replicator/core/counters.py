"""What one owner has brought to the sink, counted."""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc.order.ops import Rank

from milvus_cdc_replicator.core.ops import Write, WriteKind


@dataclass(slots=True)
class Counters:
    rows_inserted: int = 0
    rows_upserted: int = 0
    rows_deleted: int = 0
    rows_skipped: int = 0
    rows_refused: int = 0
    bytes_written: int = 0

    def add(self, write: Write) -> None:
        """It is durable."""
        if write.kind is WriteKind.CHANGES:
            self._count(write)
        elif write.kind is WriteKind.INSERT:
            self.rows_inserted += write.rows
        elif write.kind is WriteKind.UPSERT:
            self.rows_upserted += write.rows
        else:
            self.rows_deleted += write.rows
        self._count_refused(write)
        self.bytes_written += write.size

    def _count_refused(self, write: Write) -> None:
        for op in write.refused:
            if write.kind is WriteKind.UPSERT or (write.kind is WriteKind.CHANGES and op.replaces):
                self.rows_upserted -= op.rows
            else:
                self.rows_inserted -= op.rows

    def _count(self, write: Write) -> None:
        for op in write.ops:
            if op.rank is Rank.DELETE:
                self.rows_deleted += op.rows
            elif op.replaces:
                self.rows_upserted += op.rows
            else:
                self.rows_inserted += op.rows
