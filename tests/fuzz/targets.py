"""What takes bytes that others wrote, and the errors that each may answer with."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
from milvus_cdc.catalog import Assembly, Layout
from milvus_cdc.cli.position_file import parse_positions
from milvus_cdc.cli.task_file import InputError, parse_patch, parse_task
from milvus_cdc.codec import arrow, columns, msgstream, operations, wire
from milvus_cdc.codec.messages import Insert
from milvus_cdc.errors import BugError, CdcError, UserError
from milvus_cdc.source import LogEntry
from milvus_cdc_controller import config
from milvus_cdc_controller.core.collection import Checkpoint, CollectionProgress
from milvus_cdc_controller.store import records
from milvus_cdc_replicator import settings
from pymilvus.grpc_gen import common_pb2, milvus_pb2

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors"
_KINDS = (
    pa.int64(), pa.int8(), pa.bool_(), pa.string(), pa.float32(), pa.float64(), arrow.SPARSE,
    pa.list_(pa.float32(), 4), pa.list_(pa.int32()), pa.binary(8), pa.list_(pa.int8(), 4),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    samples: Sequence[bytes]
    take: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    text: bool = False


@cache
def entries() -> tuple[bytes, ...]:
    recorded = json.loads((VECTORS / "golden_msgstream_kafka_2.3.5.json").read_text())
    # Ticks are most of them and all the same.
    kept = [r for at, r in enumerate(recorded) if r["type"] != "TimeTick" or at % 20 == 0]
    return tuple(base64.b64decode(record["value_b64"]) for record in kept)


@cache
def column_samples() -> tuple[bytes, ...]:
    found: list[bytes] = []
    for payload in entries():
        message = msgstream.decode(LogEntry(b"", payload))
        if isinstance(message, Insert):
            found += message.columns
    return tuple(found)


@cache
def metadata() -> dict[str, bytes]:
    dump = json.loads((VECTORS / "golden_etcd_2.3.5.json").read_text())
    return {key: base64.b64decode(value) for key, value in dump.items()}


def _entry(payload: bytes) -> object:
    return msgstream.decode(LogEntry(b"", payload))


def _column(column: bytes) -> None:
    columns.field_id(column)
    rows = columns.num_rows(column)
    columns.concat([column, column_samples()[0]])
    if rows:
        columns.select_rows(column, [0, rows - 1])


def _keys(column: bytes) -> object:
    return columns.key_values(column)


def _arrow(data: bytes) -> object:
    """The first byte says as what it is to be read."""
    kind, rows = data[0] % len(_KINDS) if data else 0, data[1] if len(data) > 1 else 0
    return arrow.decode(data[2:], _KINDS[kind], rows)


def _walk(data: bytes) -> object:
    return wire.walk(data, 0, len(data))


def _etcd_value(data: bytes) -> object:
    """One value of a source's metadata is another; the first two bytes say which."""
    keys = sorted(metadata())
    changed = keys[int.from_bytes(data[:2], "little") % len(keys)]
    assembly = _assembly()
    assembly.apply(changed, data[2:])
    try:
        return assembly.catalogue(1, 1)
    finally:
        assembly.apply(changed, metadata()[changed])


@cache
def _assembly() -> Assembly:
    """What belongs to the same collection decides with what is changed."""
    assembly = Assembly(Layout("by-dev"))
    for key, value in metadata().items():
        assembly.apply(key, value)
    return assembly


def _etcd_key(data: bytes) -> object:
    assembly = Assembly(Layout("by-dev"))
    key, _, value = data.partition(b"\0\0")
    assembly.apply("by-dev/meta/" + key.decode("utf-8", "replace"), value)
    return assembly.catalogue(1, 1)


def _record(data: bytes) -> object:
    key = ("checkpoints/u/7", "tasks/u", "sources/s")[data[0] % 3 if data else 0]
    return records.decode(key, data[1:])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _task(data: bytes) -> None:
    parse_task(_text(data))


def _patch(data: bytes) -> None:
    parse_patch(_text(data))


def _positions(data: bytes) -> None:
    parse_positions(_text(data))


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Gone when this process ends."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


@cache
def _scratch() -> Path:
    return Path(_folder().name) / "config.yaml"


def _controller(data: bytes) -> object:
    _scratch().write_bytes(data)
    return config.load(_scratch())


def _replicator(data: bytes) -> object:
    _scratch().write_bytes(data)
    return settings.load(_scratch())


def _operations() -> list[bytes]:
    def base(kind: str) -> common_pb2.MsgBase:
        return common_pb2.MsgBase(msg_type=common_pb2.MsgType.Value(kind), timestamp=7)

    flush = milvus_pb2.FlushRequest(base=base("Flush"), db_name="a", collection_names=["b"])
    user = milvus_pb2.CreateCredentialRequest(base=base("CreateCredential"), username="u")
    new = milvus_pb2.UpdateCredentialRequest(base=base("UpdateCredential"), newPassword="p")
    return [each.SerializeToString() for each in (flush, user, new)]


def _stored() -> list[bytes]:
    progress = CollectionProgress("u", 7, (Checkpoint("v0", "p0", b"\x05", 5, 9),), 3)
    bodies = [records.encode(progress), b'{"format_version":7,"uid":"u"}']
    return [bytes([kind]) + body for kind in range(3) for body in bodies]


def _examples(*names: str) -> list[bytes]:
    """Each whole, and each of its blocks alone. Without comments: reading the files of people takes
    its time by the character, and what is in a comment changes nothing.
    """
    found: list[bytes] = []
    for name in names:
        lines = (ROOT / name).read_text().splitlines()
        bare = [line for each in lines if (line := re.sub(r"(^|\s+)#.*", "", each).rstrip())]
        whole = "\n".join(bare) + "\n"
        blocks = re.split(r"^(?=\S)", whole, flags=re.MULTILINE)
        found += [text.encode() for text in (whole, *blocks) if text]
    return list(dict.fromkeys(found))


_TASKS = (
    *("examples/task.yaml", "deploy/examples/secure/task.yaml"),
    "examples/task-secured-queue.yaml",
    *("deploy/examples/kafka.yaml", "deploy/examples/postgres.yaml"),
)
_CONTROLLERS = ("examples/controller.yaml", "deploy/examples/secure/controller.yaml")
_REPLICATORS = ("examples/replicator.yaml", "deploy/examples/secure/replicator.yaml")
_PATCHES = [b"selection: {include: ['a.*']}\nlimits: {rowsPerSecond: 5}\nlabels: {a: b}\n"]
_POSITIONS = [
    b'{"positions": [{"vchannel": "a_1v0", "readFrom": "BQ==", "resolvedTs": "5"}]}',
    b'{"channel_checkpoints": {"a_1v0": "CgN2XzE="}}',
    b'{"request_data": {"collection_infos": [{"name": "a", "positions": {"c": "CgN2XzE="}}]}}',
]


@cache
def targets() -> dict[str, Target]:
    meta = [n.to_bytes(2, "little") + metadata()[key] for n, key in enumerate(sorted(metadata()))]
    keys = [
        key.removeprefix("by-dev/meta/").encode() + b"\0\0" + value
        for key, value in metadata().items()
    ]
    typed = [
        bytes([kind, rows]) + column
        for kind in range(len(_KINDS))
        for rows in (1, 3)
        for column in column_samples()[::3]
    ]
    return {
        "log entry": Target(entries(), _entry, (CdcError,)),
        "column": Target(column_samples(), _column, (BugError,)),
        "key column": Target(column_samples(), _keys, (BugError,)),
        "arrow": Target(typed, _arrow, (BugError,)),
        "wire format": Target(column_samples(), _walk, (wire.BadWireError,)),
        "operation": Target(_operations(), operations.decode_operation, ()),
        "etcd value": Target(meta, _etcd_value, (BugError,)),
        "etcd key": Target(keys, _etcd_key, (BugError,)),
        "stored record": Target(_stored(), _record, (CdcError,)),
        "task file": Target(_examples(*_TASKS), _task, (InputError,), text=True),
        "task patch": Target(_PATCHES, _patch, (InputError,), text=True),
        "position file": Target(_POSITIONS, _positions, (InputError,), text=True),
        "controller file": Target(_examples(*_CONTROLLERS), _controller, (UserError,), text=True),
        "replicator file": Target(_examples(*_REPLICATORS), _replicator, (UserError,), text=True),
    }
