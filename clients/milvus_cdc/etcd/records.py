"""What etcd is asked and what it answers, as plain values; keys are text (any byte survives the
round trip).

Every answer carries the cluster id and the revision it was given at (etcd `ResponseHeader`),
because a caller must be able to tell another cluster, or a cluster that lost its past, from the one
it knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from milvuscdc.internal import etcd_rpc_pb2 as pb

from milvus_cdc.errors import RetryableError


def encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys that begin with `prefix` (etcd `clientv3.GetPrefixRangeEnd`)."""
    for i in range(len(prefix) - 1, -1, -1):
        if prefix[i] < 0xFF:
            return prefix[:i] + bytes([prefix[i] + 1])
    return b"\0"


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys from `start` up to, not including, `end`; an empty `end` means the one key `start`."""

    start: bytes
    end: bytes = b""
    keys_only: bool = False
    """Leave the values out of a listing; a watch always brings them."""

    @classmethod
    def key(cls, key: str) -> KeyRange:
        return cls(encode_key(key))

    @classmethod
    def prefix(cls, prefix: str, *, keys_only: bool = False) -> KeyRange:
        start = encode_key(prefix)
        return cls(start, prefix_end(start), keys_only)


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0

    @classmethod
    def of(cls, kv: pb.KeyValue) -> KeyValue:
        return cls(
            decode_key(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Cluster and revision of an answer."""

    cluster_id: int
    revision: int


@dataclass(frozen=True, slots=True)
class Listing(Answer):
    """Keys of one or more ranges, all as they stood at `revision`."""

    kvs: tuple[KeyValue, ...] = ()


@dataclass(frozen=True, slots=True)
class Deleted(Answer):
    count: int = 0


@dataclass(frozen=True, slots=True)
class LeaseGrant(Answer):
    lease: int = 0
    ttl_seconds: int = 0


class CompareTarget(StrEnum):
    MOD_REVISION = "MOD_REVISION"
    CREATE_REVISION = "CREATE_REVISION"
    VERSION = "VERSION"
    LEASE = "LEASE"


class CompareOp(StrEnum):
    EQUAL = "EQUAL"
    NOT_EQUAL = "NOT_EQUAL"
    LESS = "LESS"
    GREATER = "GREATER"


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on a number that etcd keeps beside a key; all are 0 for a key that does not
    exist.
    """

    key: str
    target: CompareTarget
    number: int
    op: CompareOp = CompareOp.EQUAL


@dataclass(frozen=True, slots=True)
class CompareValue:
    """A condition on a key's value; false for a key that does not exist."""

    key: str
    value: bytes
    op: CompareOp = CompareOp.EQUAL


@dataclass(frozen=True, slots=True)
class PutOp:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class DeleteOp:
    range: KeyRange


@dataclass(frozen=True, slots=True)
class GetOp:
    range: KeyRange


@dataclass(frozen=True, slots=True)
class TxnAnswer(Answer):
    succeeded: bool = False
    """All conditions held, so the `then` operations were done, else the `otherwise` ones."""
    results: tuple[tuple[KeyValue, ...], ...] = ()
    """For each operation done, in order, what it found: empty for puts and deletes."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    key: str
    value: bytes | None
    """None for a deletion."""
    mod_revision: int


@dataclass(frozen=True, slots=True)
class WatchBatch(Answer):
    """Whole revisions of one watched range, in order; none is split over two batches."""

    events: tuple[WatchEvent, ...] = field(default=())


class Compacted(RetryableError):
    """The revision asked for is no longer kept: list again, go on from the listing's revision."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(
            "ETCD_COMPACTED",
            "etcd no longer keeps the revision asked for"
            f" (compacted up to {compact_revision or 'an unknown one'}); list again",
        )
        self.compact_revision = compact_revision
        """The oldest revision still kept; 0 when etcd did not say."""


class WatchLost(RetryableError):
    """The watch reached a cluster that is not, or not yet, where the watch was: list again."""

    def __init__(self, message: str) -> None:
        super().__init__("ETCD_WATCH_LOST", message)
