"""What the core of one collection assignment wants done."""

from __future__ import annotations

from dataclasses import dataclass

from milvus_cdc_replicator.core.ops import Write


@dataclass(frozen=True, slots=True)
class StartWrite:
    write: Write


@dataclass(frozen=True, slots=True)
class CreatePartition:
    partition_id: int
    partition: str
    ts: int = 0
    """TSO at the source; 0 where it is not known."""


@dataclass(frozen=True, slots=True)
class DropPartition:
    partition_id: int
    partition: str
    ts: int = 0
    """TSO at the source; 0 where it is not known."""


@dataclass(frozen=True, slots=True)
class QueryPartition:
    """A row names a partition that the metadata does not list: ask the controller."""

    partition_id: int


Effect = StartWrite | CreatePartition | DropPartition | QueryPartition
