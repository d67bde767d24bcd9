"""A sink of a package of its own that takes a fixed time for each row, and keeps no rows: a journal
says when which process asked it for how many.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from milvus_cdc.rows import Table
from milvus_cdc.sink.writer import Batch, Capabilities, Opened, Opening, SchemaChange
from milvuscdc.v1 import task_pb2

NAME = "slow"
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Request:
    """Times are `time.monotonic()`, which all processes of a machine share."""

    process: int
    begin: float
    end: float
    rows: int


class SlowWriter:
    """`oneAtATime`: one request after the other in each process, as a server of that speed does
    it; else each takes its time, however many there are.
    """

    CONFIG_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "journal": {"type": "string"},
            "secondsPerRow": {"type": "number"},
            "oneAtATime": {"type": "boolean"},
        },
        "required": ["journal", "secondsPerRow", "oneAtATime"],
        "additionalProperties": False,
    }
    capabilities = Capabilities(rows_per_batch=500, in_flight=2)

    def __init__(self, config: dict[str, Any]) -> None:
        self._journal = os.open(config["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._seconds = float(config["secondsPerRow"])
        self._one_at_a_time = bool(config["oneAtATime"])
        self._free_at = 0.0

    async def probe(self) -> str:
        return "slow 1"

    def violations(self, tables: Sequence[Table]) -> list[str]:
        return []

    async def open(self, table: Table, opening: Opening, epoch: int) -> Opened:
        return Opened()

    async def apply(self, change: SchemaChange, timeout_seconds: float) -> None:
        pass

    async def write(self, table: Table, batch: Batch, timeout_seconds: float) -> None:
        begin = time.monotonic()
        end = begin + batch.num_rows * self._seconds
        if self._one_at_a_time:
            end += max(0.0, self._free_at - begin)
            self._free_at = end
        await asyncio.sleep(end - begin)
        # What it takes on a busy machine beyond that is not the sink's, but the request's.
        line = f"{os.getpid()} {begin} {time.monotonic()} {batch.num_rows}\n"
        os.write(self._journal, line.encode())

    async def release(self, table: Table) -> None:
        pass

    async def close(self) -> None:
        os.close(self._journal)


def installed(folder: Path) -> dict[str, str]:
    """The environment of a process that finds this sink, by files below `folder`."""
    info = folder / "milvus_cdc_slow_sink-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: milvus-cdc-slow-sink\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        f"[milvus_cdc.sinks]\n{NAME} = {__name__}:{SlowWriter.__name__}\n"
    )
    found = (str(folder), str(_ROOT), os.environ.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(filter(None, found))}


def sink(journal: Path, seconds_per_row: float, *, one_at_a_time: bool = False) -> task_pb2.Sink:
    result = task_pb2.Sink()
    result.plugin.name = NAME
    result.plugin.config.update(
        {
            "journal": str(journal),
            "secondsPerRow": seconds_per_row,
            "oneAtATime": one_at_a_time,
        }
    )
    return result


def read(journal: Path) -> list[Request]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [
        Request(int(process), float(begin), float(end), int(rows))
        for process, begin, end, rows in map(str.split, lines)
    ]


def most_at_once(requests: Sequence[Request]) -> int:
    """Of all processes together."""
    changes = sorted([(each.begin, 1) for each in requests] + [(each.end, -1) for each in requests])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
