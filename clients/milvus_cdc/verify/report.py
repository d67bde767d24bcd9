"""What a comparison of one collection says: progress, differences, the result.

The shapes mirror `milvuscdc.v1` VerifyProgress, VerifyDifference and VerifyCollectionResult field
by field, so that whoever runs a comparison only copies them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

WAITING_FOR_SINK = "WAITING_FOR_SINK"
COMPARING = "COMPARING"
RECHECKING = "RECHECKING"


@dataclass(frozen=True, slots=True)
class Target:
    """One collection at the source and its counterpart at the sink."""

    source_database: str
    source_collection: str
    sink_database: str
    sink_collection: str

    @property
    def name(self) -> str:
        return f"{self.source_database or 'default'}.{self.source_collection}"


class DifferenceKind(StrEnum):
    """Named as VerifyDifference.Kind without its prefix."""

    MISSING = "MISSING"
    EXTRA = "EXTRA"
    DIFFERENT = "DIFFERENT"
    DOUBLED = "DOUBLED"


@dataclass(frozen=True, slots=True)
class Progress:
    collection: str
    phase: str
    rows_compared: int
    rows_total: int
    """Rows the source counted at the start."""


@dataclass(frozen=True, slots=True)
class Difference:
    collection: str
    partition: str
    kind: DifferenceKind
    key: str
    fields: tuple[str, ...] = ()


@dataclass(slots=True)
class CollectionResult:
    """The verdict on one collection; counters are those of VerifyCollectionResult."""

    collection: str
    equal: bool = False
    reason: str = ""
    message: str = ""
    rows_source: int = 0
    rows_sink: int = 0
    missing: int = 0
    extra: int = 0
    different: int = 0
    doubled: int = 0
    source_doubled: int = 0
    rows_compared: int = field(default=0)
    """Keys found on both sides and compared field by field."""


OnEvent = Callable[[Progress | Difference], Awaitable[None]]
