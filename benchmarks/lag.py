"""Lag as a reader of the sink sees it: from the source's acknowledgement of a row until a query
with bounded consistency finds it at the sink.

A row waits for a time tick twice: at the source, before the replicator knows its place in order,
and at the sink, before its query nodes show it.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

import grpc
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from pymilvus import MilvusClient

from benchmarks.rig import Rig, wait_until
from benchmarks.rows import Connection, Requests, Table, create, drop

QUERY = "/milvus.proto.milvus.MilvusService/Query"
POLL_SECONDS = 0.004
GIVE_UP_SECONDS = 60.0
LOAD_ROWS = 100
LOAD_FIRST_KEY = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Lag:
    """Seconds over `probes` single rows, with `background` rows per second beside them."""

    queue: str
    tick_ms: int
    background: int
    probes: int
    p50: float
    p99: float
    largest: float


class _Reader:
    def __init__(self, address: str, collection: str) -> None:
        self._collection = collection
        self._channel = grpc.insecure_channel(address)
        self._query = self._channel.unary_unary(
            QUERY,
            request_serializer=milvus_pb2.QueryRequest.SerializeToString,
            response_deserializer=milvus_pb2.QueryResults.FromString,
        )

    def sees(self, key: int) -> bool:
        request = milvus_pb2.QueryRequest(
            collection_name=self._collection,
            expr=f"id == {key}",
            output_fields=["id"],
            consistency_level=common_pb2.ConsistencyLevel.Bounded,
        )
        answer = self._query(request, timeout=10)
        if answer.status.code or answer.status.error_code:
            raise RuntimeError(f"query refused: {answer.status.reason}")
        return any(len(column.scalars.long_data.data) for column in answer.fields_data)

    def close(self) -> None:
        self._channel.close()


def measure(rig: Rig, background: int, seconds: float, dim: int = 128) -> Lag:
    """Probes one row after another at random moments."""
    table = Table("bench_lag", dim)
    stack = rig.stack
    for uri in (stack.source.uri, stack.sink.uri):
        drop(uri, table.name)
    create(stack.source.uri, table, loaded=True)
    rig.create_task("bench-lag", [table.name])
    requests = Requests(table)
    writer = Connection(stack.source.address)
    reader = _Reader(stack.sink.address, table.name)
    _until_loaded(stack.sink.uri, table.name)
    stop = threading.Event()
    load = threading.Thread(
        target=_load, args=(stack.source.address, requests, background, stop), daemon=True
    )
    try:
        writer.insert(requests.insert(0, 1))
        wait_until(lambda: reader.sees(0), 60, "the first row at the sink")
        if background:
            load.start()
            time.sleep(3)
        lags = []
        end = time.monotonic() + seconds
        key = 1
        while time.monotonic() < end:
            time.sleep(random.uniform(0.05, 0.35))
            writer.insert(requests.insert(key, 1))
            acknowledged = time.perf_counter()
            wait_until(
                lambda key=key: reader.sees(key),  # type: ignore[misc]
                GIVE_UP_SECONDS,
                f"row {key} at the sink",
                every=POLL_SECONDS,
            )
            lags.append(time.perf_counter() - acknowledged)
            key += 1
        rig.check("bench-lag")
    finally:
        stop.set()
        if load.is_alive():
            load.join()
        writer.close()
        reader.close()
    rig.delete_task("bench-lag")
    for uri in (stack.source.uri, stack.sink.uri):
        drop(uri, table.name)
    lags.sort()
    return Lag(
        queue=rig.queue,
        tick_ms=rig.tick_ms,
        background=background,
        probes=len(lags),
        p50=percentile(lags, 50),
        p99=percentile(lags, 99),
        largest=lags[-1],
    )


def percentile(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def _until_loaded(uri: str, name: str) -> None:
    client = MilvusClient(uri)

    def loaded() -> bool:
        return client.has_collection(name) and "Loaded" in str(
            client.get_load_state(name).get("state")
        )

    try:
        wait_until(loaded, 120, f"{name} to be loaded at the sink")
    finally:
        client.close()


def _load(address: str, requests: Requests, rate: int, stop: threading.Event) -> None:
    """Writes `rate` rows a second in inserts of a hundred."""
    connection = Connection(address)
    key = LOAD_FIRST_KEY
    due = time.monotonic()
    while not stop.is_set():
        connection.insert(requests.insert(key, LOAD_ROWS))
        key += LOAD_ROWS
        due += LOAD_ROWS / rate
        stop.wait(max(0.0, due - time.monotonic()))
    connection.close()
