"""Records as stored: JSON with a `format_version`, bytes as base64.

Laws: a field that is missing gets its default, so that older values stay readable; a newer format
is refused, because writing it back would lose what this version does not know.
"""

from __future__ import annotations

import base64
import json
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from milvus_cdc.errors import BugError, UserError
from milvus_cdc.model import part_of_assignment

from milvus_cdc_controller.core.collection import CollectionProgress, CollectionRecord
from milvus_cdc_controller.core.effects import Record
from milvus_cdc_controller.core.grant import Grant
from milvus_cdc_controller.core.hold import HoldRecord
from milvus_cdc_controller.core.replicator import ReplicatorRecord
from milvus_cdc_controller.core.task import MetadataRecord, SourceRecord, TaskRecord

FORMAT_VERSION = 10
"""2: the incarnation of a checkpoint's topic. 3: names at the sink, and what is carried there.
4: what sinks are known to hold. 5: marks on replicators, and which of them a task asks for.
6: what is to be recounted there. 7: holds, secrets that are encrypted. 8: limits of requests and
connections, who made a task. 9: collections that are given out in parts. 10: owners
that are lost while they write again.
"""
_BEFORE_PARTS = 8
_OF_PARTS = 9
_LEFT_OUT = frozenset({"max_parts", "parts", "whole_until_ts", "lost_again"})
"""Where they say nothing: then versions before can read the record, too."""

_KINDS: dict[str, type[Any]] = {
    "tasks": TaskRecord,
    "collections": CollectionRecord,
    "checkpoints": CollectionProgress,
    "metadata": MetadataRecord,
    "assignments": Grant,
    "sources": SourceRecord,
    "replicators": ReplicatorRecord,
    "holds": HoldRecord,
}


def encode(record: Record) -> bytes:
    body = _plain(record)
    body["format_version"] = _format(record)
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def decode(key: str, value: bytes) -> Record:
    """Raises UserError STORE_TOO_NEW, BugError STORE_UNREADABLE."""
    kind = _KINDS.get(key.partition("/")[0])
    if kind is None:
        raise UserError(
            "STORE_TOO_NEW",
            f"The store holds {key!r}, which this version does not know; use the newer controller.",
        )
    try:
        body = json.loads(value)
        version = body.pop("format_version")
        if version > FORMAT_VERSION:
            raise UserError(
                "STORE_TOO_NEW",
                f"{key} has format {version}, this controller knows up to {FORMAT_VERSION}; "
                "use the newer controller.",
            )
        record: Record = _reader(kind)(body)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BugError("STORE_UNREADABLE", f"{key} cannot be read: {error}") from error
    return record


def _format(record: Record) -> int:
    """The oldest that can say it."""
    if isinstance(record, CollectionProgress) and record.recount and record.recount.lost_again:
        return FORMAT_VERSION
    return _OF_PARTS if _has_parts(record) else _BEFORE_PARTS


def _has_parts(record: Record) -> bool:
    match record:
        case TaskRecord():
            return bool(record.spec.max_parts)
        case CollectionProgress():
            return bool(record.parts or record.whole_until_ts)
        case Grant():
            return part_of_assignment(record.assignment_id) is not None
    return False


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {
            name: _plain(told)
            for name in _hints(value.__class__)
            if (told := getattr(value, name)) or name not in _LEFT_OUT
        }
    return value


@lru_cache(maxsize=128)
def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@lru_cache(maxsize=512)
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Makes a value of that type of what JSON holds; made once, because who is elected has
    thousands of records to read.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (_reader(arg) for arg in get_args(kind) if arg is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        args = get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            each = _reader(args[0])
            return lambda value: tuple([each(item) for item in value])
        parts = [_reader(arg) for arg in args]
        return lambda value: tuple([part(item) for part, item in zip(parts, value, strict=True)])
    if kind is bytes:
        return base64.b64decode
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    if is_dataclass(kind):
        readers = {name: _reader(hint) for name, hint in _hints(kind).items()}  # type: ignore[arg-type]
        return lambda value: kind(  # type: ignore[operator]
            **{name: readers[name](item) for name, item in value.items()}
        )
    return _as_it_is


def _as_it_is(value: Any) -> Any:
    return value
