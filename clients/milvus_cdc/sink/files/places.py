"""Where everything of a collection lies below the sink's folder or prefix. Pure.

    {database}/{collection}-{collection id}/
        _manifests/000000000042.json                 what is published, see `manifest`
        _manifests/folded-000000000001-000000000100.json.gz
        _schemas/{hash}.json
        generation-0001/change_date=2026-11-21/part-000000000042-{epoch}-{attempt}-0.parquet

Laws: two collections never share a folder; a name that a path cannot hold is escaped so that the
result can be turned back. Names with `_` or `.` in front are hidden from dataset readers (Hive,
Spark, Arrow), so no folder with rows begins with one. `change_date` is the UTC day of the change at
the source; no column has this name, see `encode.OWN_COLUMNS`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from urllib.parse import quote

from milvus_cdc.model import tso_to_ms

MANIFESTS = "_manifests"
SCHEMAS = "_schemas"
LOCATION = "_location.json"
"""In the folder of a name that a collection got later: where it lies."""
DATE_KEY = "change_date"

_NAME_BYTES_MAX = 160
_MANIFEST = re.compile(r"(\d{12})\.json")
_FOLDED = re.compile(r"folded-(\d{12})-(\d{12})\.json\.gz")
_PART = re.compile(r"part-(\d{12})-(\d+)-([0-9a-f]+)-(\d+)\.[a-z.]+")
_COLLECTION = re.compile(r"(.+)-(\d+)")


def escape(name: str) -> str:
    """Letters, digits, `.`, `_` and `-` as they are, everything else and a leading `.` or `_` as
    the percent signs of its UTF-8. Of a very long name the end is replaced by a hash.
    """
    text = quote(name, safe="")
    text = text.replace("~", "%7E")
    if text[:1] in (".", "_"):
        text = f"%{ord(text[0]):02X}{text[1:]}"
    if len(text) > _NAME_BYTES_MAX:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        text = f"{text[:_NAME_BYTES_MAX]}~{digest}"
    return text


def collection_folder(database: str, collection: str, collection_id: int) -> str:
    """An empty database is Milvus' `default`."""
    return f"{escape(database or 'default')}/{escape(collection)}-{collection_id}"


def is_collection_folder(name: str) -> bool:
    return _COLLECTION.fullmatch(name) is not None


def generation_folder(generation: int) -> str:
    """A collection that is filled anew begins a new one."""
    return f"generation-{generation:04d}"


def date_folder(day: date) -> str:
    return f"{DATE_KEY}={day.isoformat()}"


def day_of(ts: int) -> date:
    """The UTC day of a TSO."""
    return datetime.fromtimestamp(tso_to_ms(ts) / 1000, UTC).date()


def manifest_path(number: int) -> str:
    return f"{MANIFESTS}/{number:012d}.json"


def folded_path(first: int, last: int) -> str:
    return f"{MANIFESTS}/folded-{first:012d}-{last:012d}.json.gz"


def schema_path(digest: str) -> str:
    return f"{SCHEMAS}/{digest}.json"


def part_path(
    generation: int, day: date, number: int, epoch: int, attempt: str, index: int, suffix: str
) -> str:
    """Every attempt has names of its own: one that arrives late changes no published file."""
    name = f"part-{number:012d}-{epoch}-{attempt}-{index}.{suffix}"
    return f"{generation_folder(generation)}/{date_folder(day)}/{name}"


@dataclass(frozen=True, slots=True)
class Part:
    """What the name of a file with rows says."""

    number: int
    epoch: int
    attempt: str


def part_of(path: str) -> Part | None:
    """None when it is no file of ours."""
    match = _PART.fullmatch(path.rpartition("/")[2])
    return Part(int(match[1]), int(match[2]), match[3]) if match else None


def manifest_number(path: str) -> int | None:
    match = _MANIFEST.fullmatch(path.rpartition("/")[2])
    return int(match[1]) if match else None


def folded_range(path: str) -> tuple[int, int] | None:
    match = _FOLDED.fullmatch(path.rpartition("/")[2])
    return (int(match[1]), int(match[2])) if match else None
