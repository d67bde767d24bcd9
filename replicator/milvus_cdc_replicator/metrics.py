"""Prometheus metrics of the replicator; labels are task and collection names, never row
contents.
"""

from __future__ import annotations

import contextlib

from prometheus_client import Counter, Gauge, Histogram

BYTES_READ = Counter(
    "milvus_cdc_replicator_read_bytes", "Payload bytes read from the log", ["pchannel"]
)
READ_ERRORS = Counter(
    "milvus_cdc_replicator_read_errors", "Interrupted or failed reads", ["error_class"]
)
ROWS_WRITTEN = Counter(
    "milvus_cdc_replicator_written_rows", "Rows durable in the sink", ["task", "collection", "op"]
)
BYTES_WRITTEN = Counter(
    "milvus_cdc_replicator_written_bytes", "Log bytes durable in the sink", ["task", "collection"]
)
WRITES_IN_FLIGHT = Gauge("milvus_cdc_replicator_writes_in_flight", "Requests at the sink now")
WRITE_SECONDS = Histogram(
    "milvus_cdc_replicator_write_seconds",
    "Duration of sink requests",
    ["op"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
RATE_LIMITED_SECONDS = Counter(
    "milvus_cdc_replicator_rate_limited_seconds",
    "Time that writes and openings waited for the task's limits, summed over those that waited",
    ["task"],
)
DEAD_LETTERS = Counter(
    "milvus_cdc_replicator_dead_letters",
    "Rows that the sink refused and that went to the task's dead letters",
    ["task", "collection", "reason"],
)
DOUBLED_KEYS = Counter(
    "milvus_cdc_replicator_doubled_keys",
    "Keys found at the sink too often, or gone, or back, after a replicator was lost",
    ["task", "collection", "what"],
)
WRITE_ERRORS = Counter(
    "milvus_cdc_replicator_write_errors",
    "Sink requests that failed",
    ["task", "error_class", "reason"],
)
LAG_SECONDS = Gauge(
    "milvus_cdc_replicator_lag_seconds",
    "Source time now minus source time up to which every row is durable in the sink",
    ["task", "collection"],
)
CHECKPOINT_AGE = Gauge(
    "milvus_cdc_replicator_checkpoint_timestamp_seconds",
    "Source time up to which every row is durable, Unix seconds",
    ["task", "collection"],
)
OPERATIONS_LEFT = Counter(
    "milvus_cdc_replicator_operations_left",
    "Entries of the operations channel that are carried by other means, or are not known",
    ["kind"],
)
QUEUE_BYTES = Gauge("milvus_cdc_replicator_queue_bytes", "Bytes read and not yet durable")
LEASE_SECONDS = Gauge("milvus_cdc_replicator_lease_seconds", "Time the process may still write")
ASSIGNMENTS = Gauge("milvus_cdc_replicator_assignments", "Assignments held")
CONNECTED = Gauge("milvus_cdc_replicator_connected", "1 while the stream to the controller is up")


def forget(task: str, collection: str) -> None:
    """Gauges of a name that the collection no longer has."""
    for gauge in (LAG_SECONDS, CHECKPOINT_AGE):
        with contextlib.suppress(KeyError):
            gauge.remove(task, collection)
