"""Shows answers as a table for people, or as proto3 JSON or YAML for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from milvuscdc.v1 import fleet_service_pb2, task_pb2, verify_pb2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Line = tuple[str, ...]
TASK_HEAD = ("NAME", "STATE", "COLLECTIONS", "LAG", "REASON", "MESSAGE")
COLLECTION_HEAD = (
    "COLLECTION",
    "STATE",
    "CHECKPOINT",
    "LAG",
    "INSERTED",
    "UPSERTED",
    "DELETED",
    "REPLICATOR",
    "REASON",
)
CONTROLLER_HEAD = ("ADDRESS", "ROLE", "HOST", "VERSION", "STARTED", "NAME")
REPLICATOR_HEAD = (
    "NAME",
    "STATE",
    "ASSIGNMENTS",
    "CAPACITY",
    "ROWS/S",
    "VERSION",
    "PEER",
    "HEARTBEAT",
    "REASON",
)
ASSIGNMENT_HEAD = ("NAME", "TASK", "COLLECTION", "STATE", "EPOCH", "ROWS/S", "REPLICATOR")


def to_dict(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message)


def show_item(message: Message, form: str, head: Line, line: Callable[[Any], Line]) -> None:
    if form == "table":
        show_table(head, [line(message)])
    else:
        show_data(to_dict(message), form)


def show_list(
    name: str, messages: Sequence[Message], form: str, head: Line, line: Callable[[Any], Line]
) -> None:
    """JSON and YAML are one object with the list under `name`."""
    if form == "table":
        show_table(head, [line(message) for message in messages])
    else:
        show_data({name: [to_dict(message) for message in messages]}, form)


def show_data(data: Any, form: str) -> None:
    if form == "json":
        print(json.dumps(data, indent=2, ensure_ascii=False), flush=True)
    else:
        print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), end="", flush=True)


def show_event(data: Any, form: str) -> None:
    """One of a stream: a line of JSON, or a YAML document."""
    if form == "json":
        print(json.dumps(data, ensure_ascii=False), flush=True)
    else:
        print("---")
        show_data(data, form)


def show_table(head: Line, lines: Sequence[Line]) -> None:
    if sys.stdout.isatty():
        table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
        for line in lines:
            table.add_row(*(_escape(cell) for cell in line))
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    for line in (head, *lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def _escape(cell: str) -> str:
    return cell.replace("[", "\\[")


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _lag(message: Any) -> str:
    return f"{message.lag.ToTimedelta().total_seconds():.1f}s" if message.HasField("lag") else "-"


def _age(message: Any, field: str) -> str:
    if not message.HasField(field):
        return "-"
    stamp: Timestamp = getattr(message, field)
    seconds = (datetime.now(UTC) - stamp.ToDatetime(UTC)).total_seconds()
    return f"{max(seconds, 0):.1f}s ago"


def _enum(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def task_line(task: task_pb2.Task) -> Line:
    progress = task.progress
    return (
        _short(task.name),
        _enum(task_pb2.TaskState.Name(task.state), "TASK_STATE_"),
        f"{progress.collections_running}/{progress.collections}",
        _lag(progress),
        task.reason,
        task.message,
    )


def collection_line(item: task_pb2.TaskCollection) -> Line:
    source = f"{item.database}.{item.collection}"
    sink = f"{item.sink_database}.{item.sink_collection}"
    owners = [item.replicator] if not item.parts else [part.replicator for part in item.parts]
    return (
        source if sink in (source, ".") else f"{source} -> {sink}",
        _enum(task_pb2.CollectionState.Name(item.state), "COLLECTION_STATE_"),
        _age(item, "checkpoint_time"),
        _lag(item),
        str(item.rows_inserted),
        str(item.rows_upserted),
        str(item.rows_deleted),
        ",".join(_short(owner) or "-" for owner in owners),
        " ".join(filter(None, (item.reason, item.message))),
    )


def controller_line(item: fleet_service_pb2.Controller) -> Line:
    return (
        item.address,
        _enum(fleet_service_pb2.ControllerRole.Name(item.role), "CONTROLLER_ROLE_"),
        item.host,
        item.version,
        _age(item, "start_time"),
        _short(item.name),
    )


def replicator_line(item: fleet_service_pb2.Replicator) -> Line:
    state = _enum(fleet_service_pb2.ReplicatorState.Name(item.state), "REPLICATOR_STATE_")
    held = str(item.assignments)
    if item.drain.state == fleet_service_pb2.Drain.STATE_RUNNING:
        held += f" of {item.drain.total}"
    return (
        _short(item.name),
        f"{state},CORDONED" if item.cordoned else state,
        held,
        str(item.capacity) if item.capacity else "no limit",
        f"{item.rows_per_second:.0f}",
        item.version or "-",
        item.peer or "-",
        _age(item, "heartbeat_time"),
        " ".join(filter(None, (item.reason, item.message))),
    )


def assignment_line(item: fleet_service_pb2.AssignmentInfo) -> Line:
    target = f" -> {_short(item.moving_to)}" if item.moving_to else ""
    return (
        _short(item.name),
        _short(item.task),
        item.collection or "(metadata)",
        item.state,
        str(item.epoch),
        f"{item.rows_per_second:.0f}",
        (_short(item.replicator) or "-") + target,
    )


def difference_text(item: verify_pb2.VerifyDifference) -> str:
    kind = _enum(verify_pb2.VerifyDifference.Kind.Name(item.kind), "KIND_").lower()
    place = f" partition {item.partition}" if item.partition else ""
    fields = f" ({', '.join(item.fields)})" if item.fields else ""
    return f"  {kind:<9} {item.collection}{place} key {item.key!r}{fields}"


def result_text(item: verify_pb2.VerifyCollectionResult) -> str:
    verdict = "equal" if item.equal else (item.reason or "DIFFERENT")
    counts = [
        f"{name} {getattr(item, name)}"
        for name in ("missing", "extra", "different", "doubled")
        if getattr(item, name) or not item.equal
    ]
    if item.source_doubled:
        counts.append(f"doubled at the source {item.source_doubled}")
    rows = f"rows {item.rows_source} at the source, {item.rows_sink} at the sink"
    text = f"{item.collection}: {verdict}; {rows}" + "".join(f"; {c}" for c in counts)
    return f"{text}; {item.message}" if item.message else text
