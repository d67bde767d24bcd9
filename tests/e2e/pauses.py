"""How long no row of a collection reached its sink: read off the replicators' own counters."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from tests.servers.services import ReplicatorProcess

LOOK_SECONDS = 0.05
_LINE = re.compile(
    r'^milvus_cdc_replicator_written_rows_total\{collection="([^"]+)",[^}]*\} (\S+)', re.MULTILINE
)


def spread(what: str, seconds: Sequence[float], *, goal: float | None = None) -> str:
    """How a figure is shown: median, 99th percentile (nearest rank) and the worst."""
    ordered = sorted(seconds)
    p99 = at_99(ordered)
    text = (
        f"{what}, {len(ordered)} times: p50 {statistics.median(ordered):.2f} s, p99 {p99:.2f} s, "
        f"max {ordered[-1]:.2f} s"
    )
    return text if goal is None else f"{text} (goal: below {goal:g} s)"


def at_99(seconds: Sequence[float]) -> float:
    """The 99th percentile; of fewer than a hundred the worst."""
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


class Pauses:
    """Watches while the block runs; `longest` is asked for a span of time."""

    def __init__(self, replicators: Iterable[ReplicatorProcess]) -> None:
        self._replicators = list(replicators)
        self._counts: dict[str, dict[str, float]] = {}
        self._grown: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
        """By collection: when rows were seen to have come, and by whom."""
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
            inside = [since, *(at for at, _ in times if since < at < until), until]
            found[collection] = max(b - a for a, b in itertools.pairwise(inside))
        return found

    def first(self, collection: str, since: float, *, but: str) -> float | None:
        """Seconds from then to the first row that another replicator than `but` brought."""
        times = [at for at, by in self._grown[collection] if at > since and by != but]
        return times[0] - since if times else None

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
                        self._grown[collection].append((now, replicator.name))
                self._counts[replicator.name] = counts
