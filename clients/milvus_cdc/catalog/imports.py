"""Bulk imports as the source's metadata shows them: rows that came as files, in no log; pure.

Formats: `importtask/{id}` of Milvus 2.2 and 2.3 (seen on 2.3.5), `datacoord-meta/import-job/{id}`
with `datacoord-meta/import-task/{id}` of 2.4 and 2.5 (milvus `internal/proto/data_coord.proto`; not
seen on a server). Milvus removes them after hours, so whoever is told must remember.
"""

from __future__ import annotations

import re
from datetime import datetime

from milvuscdc.internal import milvus_meta_pb2 as meta_pb

from milvus_cdc.catalog.layout import Kind, Place
from milvus_cdc.catalog.values import Entry, parse
from milvus_cdc.model import Import

# milvus.proto.common.ImportState and internal.ImportJobState: an import that failed has no rows.
_TASK_FAILED, _TASK_FAILED_AND_CLEANED = 1, 7
_JOB_FAILED = 4


class Imports:
    """Every import that has a key, by the collection it went into."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, Import]] = {}
        """(collection, import) by its id."""
        self._files: dict[int, tuple[int, int]] = {}
        """(job, rows) by the id of one of a job's tasks."""

    def apply(self, place: Place, entry: Entry | None) -> set[int]:
        """Takes one key's value; which collections it says something new of."""
        number = place.object_id
        if place.kind is Kind.IMPORT_FILES:
            before = self._files.pop(number, None)
            if entry is not None:
                task = parse(meta_pb.ImportJobTask, entry)
                rows = sum(stats.total_rows for stats in task.file_stats)
                self._files[number] = (task.job_id, rows)
            jobs = {each[0] for each in (before, self._files.get(number)) if each is not None}
            return {self._found[job][0] for job in jobs if job in self._found}
        gone = self._found.pop(number, None)
        found = None if entry is None else _decode(place.kind, entry)
        if found is not None:
            self._found[number] = found
        return {each[0] for each in (gone, found) if each is not None}

    def of(self, collection_id: int) -> tuple[Import, ...]:
        """By id."""
        return tuple(
            Import(number, found.rows or self._rows(number), found.time_ms)
            for number, (owner, found) in sorted(self._found.items())
            if owner == collection_id
        )

    def _rows(self, job_id: int) -> int:
        return sum(rows for job, rows in self._files.values() if job == job_id)


def _decode(kind: Kind, entry: Entry) -> tuple[int, Import] | None:
    """None for an import that left nothing behind."""
    if kind is Kind.IMPORT_TASK:
        task = parse(meta_pb.ImportTask, entry)
        if task.state.state_code in (_TASK_FAILED, _TASK_FAILED_AND_CLEANED):
            return None
        return task.collection_id, Import(task.id, task.state.row_count, task.create_ts * 1000)
    job = parse(meta_pb.ImportJob, entry)
    if job.state == _JOB_FAILED:
        return None
    return job.collection_id, Import(job.job_id, 0, _time_ms(job.start_time or job.complete_time))


def _time_ms(text: str) -> int:
    """Unix milliseconds of an RFC 3339 time; 0 when it is none."""
    try:
        return int(datetime.fromisoformat(re.sub("Z$", "+00:00", text)).timestamp() * 1000)
    except ValueError:
        return 0
