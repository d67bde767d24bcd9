"""How long no row of a collection reached its sink: read off the replicators' own counters."""

from __future__ import annotations

import itertools
import re
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from tests.servers.services import ReplicatorProcess

LOOK_SECONDS = 0.05
_LINE = re.compile(
    r'^milvus_cdc_replicator_written_rows_total\{collection="([^"]+)",[^}]*\} (\S+)', re.MULTILINE
)


class Pauses:
    """Watches while the block runs; `longest` is asked for a span of time."""

    def __init__(self, replicators: Iterable[ReplicatorProcess]) -> None:
        self._replicators = list(replicators)
        self._counts: dict[str, dict[str, float]] = {}
        self._grown: defaultdict[str, list[float]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def longest(self, since: float, until: float) -> dict[str, float]:
        """Seconds by collection, between two times of `time.monotonic()`."""
        found = {}
        for collection, times in self._grown.items():
            inside = [since, *(at for at in times if since < at < until), until]
            found[collection] = max(b - a for a, b in itertools.pairwise(inside))
        return found

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            for replicator in self._replicators:
                try:
                    with urllib.request.urlopen(replicator.metrics_url, timeout=1) as answer:
                        text = answer.read().decode()
                except OSError:
                    continue  # not running
                now = time.monotonic()
                counts: defaultdict[str, float] = defaultdict(float)
                for collection, count in _LINE.findall(text):
                    counts[collection] += float(count)
                before = self._counts.get(replicator.name, {})
                for collection, count in counts.items():
                    if count != before.get(collection, 0.0):
                        self._grown[collection].append(now)
                self._counts[replicator.name] = counts
