"""When the progress of each assignment is told, and with which number.

Laws: news are told at every round; where nothing happens a checkpoint is told often enough never to
be older than the resting time, and not all of them at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from milvuscdc.v1 import replication_service_pb2 as pb

from milvus_cdc_replicator.metadata import MetadataRunner
from milvus_cdc_replicator.report import to_progress
from milvus_cdc_replicator.retention import RetentionWatch
from milvus_cdc_replicator.runner import CollectionRunner

Runner = CollectionRunner | MetadataRunner


class Telling:
    """Of one process: its progress is numbered over all assignments."""

    def __init__(self, retention: RetentionWatch) -> None:
        self._retention = retention
        self._seq = 0
        self._told_at: dict[str, float] = {}

    def progress(self, runner: Runner) -> pb.Progress:
        """As it is now, to be sent at once."""
        self._seq += 1
        self._told_at[runner.assignment.assignment_id] = time.monotonic()
        progress = to_progress(runner.report(), self._seq)
        if isinstance(runner, MetadataRunner):
            runner.reported(self._seq)
        self._retention.add(progress, runner.assignment)
        return progress

    def forget(self, runner: Runner) -> None:
        """It was told for the last time."""
        del self._told_at[runner.assignment.assignment_id]
        self._retention.drop(runner.assignment)

    def due(
        self, runners: Mapping[str, Runner], *, every_seconds: float, resting_seconds: float
    ) -> list[str]:
        """Who has to be told of at a round, one of which comes `every_seconds`."""
        now = time.monotonic()
        due, resting = [], []
        for assignment_id, runner in runners.items():
            age = now - self._told_at.get(assignment_id, 0)
            if runner.has_news:
                due.append(assignment_id)
            elif age >= runner.resting_seconds / 2:
                resting.append((age, assignment_id))
        # So many a round that all have their turn in time, and not all of them at once.
        turns = math.ceil(len(runners) * every_seconds / resting_seconds)
        return due + [assignment_id for _, assignment_id in sorted(resting, reverse=True)[:turns]]
