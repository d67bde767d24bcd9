"""A metadata assignment on a sink and an operations channel in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.milvus_protos import common_pb2, milvus_pb2
from milvus_cdc.model import Drift, RoleGrant
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc.sink.metadata import AliasWish, MetadataWish, RbacWish
from milvus_cdc.source.memory import MemorySource
from milvus_cdc_replicator.core.lease import Lease
from milvus_cdc_replicator.gate import WriteGate, boottime
from milvus_cdc_replicator.metadata import MetadataRunner
from milvus_cdc_replicator.report import to_progress
from milvus_cdc_replicator.spec import MetadataAssignment, Operations
from milvuscdc.v1 import task_pb2

from tests.contract.sink_samples import PLAIN, Sample

CHANNEL = "by-dev-replicate-msg"


class Connections:
    def __init__(self, source: MemorySource, sink: MemorySink) -> None:
        self._source, self._sink = source, sink

    async def sink(self, _spec: object, _origin: object = None) -> MemorySink:
        return self._sink

    async def source(self, _spec: object) -> MemorySource:
        return self._source

    def using(self, _spec: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Bench:
    """One runner at a time; `start` takes the place of the one before."""

    def __init__(self) -> None:
        self.sink, self.source = MemorySink(), MemorySource()
        lease = Lease()
        lease.configure(1_000)
        lease.heartbeat_sent(1, boottime())
        lease.heartbeat_acked(1)
        self.gate = WriteGate(lease, 8)
        self.version = 0
        self.runner: MetadataRunner | None = None
        self.seq = 0

    def assignment(self, wish: MetadataWish, **other: Any) -> MetadataAssignment:
        self.version += 1
        return replace(
            MetadataAssignment(
                "uid.metadata",
                1,
                self.version,
                "tasks/t",
                task_pb2.Sink(),
                task_pb2.Source(),
                wish,
            ),
            **other,
        )

    async def start(self, assignment: MetadataAssignment, every: float = 3600) -> MetadataRunner:
        if self.runner is not None:
            await self.runner.stop()
        connections: Any = Connections(self.source, self.sink)
        self.runner = MetadataRunner(
            assignment,
            connections=connections,
            gate=self.gate,
            notify=lambda _: None,
            reconcile_seconds=every,
        )
        self.runner.start()
        return self.runner

    async def collection(self, *names: str) -> None:
        for name in names:
            await self.sink.open_collection(
                Sample("default", name, PLAIN).want(),
                opened=False,
                adopt=False,
                recreate=False,
                sink_collection_id=0,
            )

    @property
    def aliases(self) -> dict[str, str]:
        return {name: to for (_, name), to in self.sink.metadata.aliases.items()}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    if bench.runner is not None:
        await bench.runner.stop()


async def until(true: Callable[[], bool]) -> None:
    """The test's own time limit ends a wait in vain."""
    while not true():
        await asyncio.sleep(0.01)


def live(collection: str, name: str = "live") -> MetadataWish:
    return MetadataWish(aliases=(AliasWish("default", name, collection),))


async def test_each_version_is_applied_and_told(bench: Bench) -> None:
    await bench.collection("blue", "green")
    runner = await bench.start(bench.assignment(live("blue")))
    await until(lambda: runner.report().applied_version == 1)
    runner.update(bench.assignment(live("green")))
    await until(lambda: runner.report().applied_version == 2)
    assert bench.aliases == {"live": "green"}
    assert [(c.action, c.kind) for c in bench.sink.metadata.changes] == [
        ("CREATE", "alias"),
        ("ALTER", "alias"),
    ]


async def test_an_error_about_one_object_hides_no_other(bench: Bench) -> None:
    await bench.collection("blue")
    wish = MetadataWish(
        databases=(("shop", False), ("bad", False)),
        aliases=live("blue").aliases,
        rbac=RbacWish(roles=("reader",)),
    )
    bench.sink.metadata.refuse["role", "reader"] = UserError("SINK_PERMISSION_DENIED", "no")
    runner = await bench.start(bench.assignment(wish))
    await until(lambda: runner.report().state == "RETRYING")
    report = runner.report()
    assert (report.reason, report.message) == ("SINK_PERMISSION_DENIED", "role reader: no")
    assert bench.aliases == {"live": "blue"}
    assert "shop" in bench.sink.databases()
    # The aliases are there, whatever else is in the way.
    assert (report.applied_version, report.aliases_version) == (0, 1)
    bench.sink.metadata.refuse.clear()
    runner.update(bench.assignment(wish))
    await until(lambda: runner.report().applied_version == 2)
    assert runner.report().state == "RUNNING"


async def test_a_refused_alias_is_not_told_as_done(bench: Bench) -> None:
    await bench.collection("blue")
    bench.sink.metadata.refuse["alias", "live"] = RetryableError("SINK_UNAVAILABLE", "away")
    runner = await bench.start(bench.assignment(live("blue")))
    await until(lambda: runner.report().state == "RETRYING")
    assert runner.report().aliases_version == 0
    bench.sink.metadata.refuse.clear()
    await until(lambda: runner.report().aliases_version == 1)


async def test_what_a_sink_will_never_hold_is_a_remark(bench: Bench) -> None:
    await bench.collection("blue")
    bench.sink.metadata.refuse["alias", "live"] = UserError("SINK_UNSUPPORTED", "no aliases here")
    runner = await bench.start(bench.assignment(live("blue")))
    await until(lambda: runner.report().applied_version == 1)
    ((kind, message),) = runner.report().conditions
    assert kind == "SINK_UNSUPPORTED"
    assert "live" in message


async def test_what_others_change_is_mended_after_a_while(bench: Bench) -> None:
    await bench.collection("blue", "green")
    await bench.start(bench.assignment(live("blue")), every=0.05)
    await until(lambda: bench.aliases == {"live": "blue"})
    bench.sink.metadata.aliases["default", "live"] = "green"
    await until(lambda: bench.aliases == {"live": "blue"})


async def test_with_report_only_what_the_source_changed_is_touched(bench: Bench) -> None:
    await bench.collection("blue", "green")
    first = bench.assignment(live("blue"), drift=Drift.REPORT)
    runner = await bench.start(first, every=0.05)
    await until(lambda: runner.report().applied_version == 1)
    bench.sink.metadata.aliases["default", "live"] = "green"
    await until(lambda: [kind for kind, _ in runner.report().conditions] == ["DRIFT"])
    both = MetadataWish(aliases=(*live("blue").aliases, *live("green", "other").aliases))
    runner.update(bench.assignment(both, drift=Drift.REPORT))
    await until(lambda: "other" in bench.aliases)
    assert bench.aliases == {"live": "green", "other": "green"}
    # Another owner knows what had been applied.
    known = bench.assignment(both, drift=Drift.REPORT)
    runner = await bench.start(replace(known, applied_version=known.version))
    await until(lambda: bool(runner.report().conditions))
    assert bench.aliases == {"live": "green", "other": "green"}
    runner.update(bench.assignment(live("blue")))
    await until(lambda: bench.aliases["live"] == "blue")


async def test_a_user_who_is_missing_is_asked_for_and_then_gets_the_roles(bench: Bench) -> None:
    grant = RoleGrant("reader", "Collection", "blue", "default", "Search")
    rbac = RbacWish(
        users=("ann",), roles=("reader",), members=(("ann", "reader"),), grants=(grant,)
    )
    runner = await bench.start(bench.assignment(MetadataWish(rbac=rbac)), every=0.05)
    await until(lambda: runner.report().applied_version == 1)
    assert [kind for kind, _ in runner.report().conditions] == ["CREDENTIAL_NEEDED"]
    assert bench.sink.metadata.rbac.grants == {grant}
    bench.sink.metadata.rbac.users.add("ann")
    await until(lambda: bench.sink.metadata.rbac.members == {("ann", "reader")})
    await until(lambda: runner.report().conditions == ())


# ---- the operations channel


def message(kind: str, request: Any, ts: int) -> bytes:
    request.base.msg_type = common_pb2.MsgType.Value(kind)
    request.base.timestamp = ts
    return bytes(request.SerializeToString())


def flush(ts: int, *names: str) -> bytes:
    return message("Flush", milvus_pb2.FlushRequest(db_name="d", collection_names=names), ts)


def wanted(read_from: bytes = b"", *, credentials: bool = False) -> Operations:
    return Operations(CHANNEL, read_from, True, credentials)


def told(runner: MetadataRunner) -> list[tuple[int, tuple[str, ...]]]:
    return [(each.ts, each.collections) for each in runner.report().flushes]


async def test_flushes_are_told_until_they_are_stored_and_once_only(bench: Bench) -> None:
    bench.source.append(CHANNEL, flush(1, "before"))
    runner = await bench.start(bench.assignment(MetadataWish(), operations=wanted()))
    await until(lambda: bool(runner.report().operations_read_from))
    for ts in (2, 3):
        bench.source.append(CHANNEL, flush(ts, "a"))
    await until(lambda: len(told(runner)) == 2)
    stored = to_progress(runner.report(), 7)
    runner.reported(7)
    bench.source.append(CHANNEL, flush(4, "b"))
    await until(lambda: len(told(runner)) == 3)
    assert runner.has_news
    runner.acked(7)
    assert told(runner) == [(4, ("b",))]
    # The next owner goes on from what was stored: nothing is lost, nothing told twice.
    place = stored.operations_read_from
    runner = await bench.start(bench.assignment(MetadataWish(), operations=wanted(place)))
    await until(lambda: told(runner) == [(4, ("b",))])


async def test_a_channel_that_comes_later_is_read_from_its_beginning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milvus_cdc_replicator.operations.ABSENT_SECONDS", 0.01)
    runner = await bench.start(bench.assignment(MetadataWish(), operations=wanted()))
    await until(lambda: runner.report().applied_version == 1)
    assert runner.report().state == "RUNNING"
    bench.source.append(CHANNEL, flush(1, "a"))
    await until(lambda: told(runner) == [(1, ("a",))])


async def test_what_is_not_known_is_left_to_the_metadata(bench: Bench) -> None:
    bench.source.create(CHANNEL)
    runner = await bench.start(bench.assignment(MetadataWish(), operations=wanted()))
    await until(lambda: bool(runner.report().operations_read_from))
    bench.source.append(CHANNEL, b"\xff\xff")
    index = milvus_pb2.CreateIndexRequest(collection_name="a")
    bench.source.append(CHANNEL, message("CreateIndex", index, 1))
    bench.source.append(CHANNEL, flush(2, "a"))
    await until(lambda: told(runner) == [(2, ("a",))])
    assert runner.report().conditions == ()


async def test_credentials_are_carried_out_in_order(bench: Bench) -> None:
    bench.source.create(CHANNEL)
    operations = wanted(credentials=True)
    runner = await bench.start(bench.assignment(MetadataWish(), operations=operations))
    await until(lambda: bool(runner.report().operations_read_from))
    for kind, request in (
        ("CreateCredential", milvus_pb2.CreateCredentialRequest(username="ann", password="b25l")),
        (
            "UpdateCredential",
            milvus_pb2.UpdateCredentialRequest(
                username="ann", oldPassword="b25l", newPassword="dHdv"
            ),
        ),
        ("DeleteCredential", milvus_pb2.DeleteCredentialRequest(username="bob")),
    ):
        bench.source.append(CHANNEL, message(kind, request, 5))
    await until(lambda: len(bench.sink.metadata.credentials) == 3)
    made, changed, gone = bench.sink.metadata.credentials
    assert (made.user, made.password, changed.old_password) == ("ann", "b25l", "b25l")
    assert (changed.password, gone.user) == ("dHdv", "bob")
    assert "b25l" not in repr(made)


async def test_what_the_queue_forgot_is_said_only_when_something_was_missed(
    bench: Bench,
) -> None:
    for ts in (1, 2, 3):
        bench.source.append(CHANNEL, flush(ts, "a"))
    end = (await bench.source.log_range(CHANNEL)).end
    runner = await bench.start(bench.assignment(MetadataWish(), operations=wanted()))
    await until(lambda: bool(runner.report().operations_read_from))
    last = bench.source.append(CHANNEL, flush(4, "a"))
    assert last == end
    await until(lambda: told(runner) == [(4, ("a",))])
    place = runner.report().operations_read_from
    bench.source.append(CHANNEL, flush(5, "b"))
    await until(lambda: len(told(runner)) == 2)

    async def forget(entries: int) -> None:
        await bench.runner.stop()  # type: ignore[union-attr]
        first = (await bench.source.log_range(CHANNEL)).first
        bench.source.truncate(CHANNEL, (bench.source.order(first) + entries).to_bytes(8, "little"))

    await forget(4)  # up to the one that had been seen to
    runner = await bench.start(bench.assignment(MetadataWish(), operations=wanted(place)))
    await until(lambda: told(runner) == [(5, ("b",))])
    assert runner.report().conditions == ()
    await forget(1)
    runner = await bench.start(bench.assignment(MetadataWish(), operations=wanted(place)))
    await until(lambda: [kind for kind, _ in runner.report().conditions] == ["OPERATIONS_MISSED"])
