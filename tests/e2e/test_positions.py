"""Positions on real servers: shown, set by time and by file, refused, and lost to retention."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from milvus_cdc.milvus_protos import msg_pb2
from milvus_cdc.source.positions import decode, encode
from milvuscdc.v1 import task_pb2, task_service_pb2
from pymilvus import MilvusClient

from tests.contract.queues import KafkaQueue, NatsQueue
from tests.e2e.load import make_row
from tests.e2e.pair import TASK, Pair, error_info
from tests.e2e.test_faults import FAILED, SIMPLE, source_with
from tests.servers import Stack
from tests.servers.stack import SourceQueue

QUICK: dict[str, Any] = {"retention": {"checkSeconds": 1}}
MQS = ["natsmq", pytest.param("kafka", marks=pytest.mark.kafka)]


@pytest.fixture
def stack(request: pytest.FixtureRequest, mq: SourceQueue) -> Stack:
    name = "kafka_stack" if mq == "kafka" else "nats_stack"
    found: Stack = request.getfixturevalue(name)
    return found


def command(pair: Pair, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "milvus_cdc.cli.main", "--controller", pair.controller.address,
         "task", words[0], "follow", *words[1:]],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done
    return done.stdout + done.stderr


def scrape(pair: Pair) -> str:
    text: bytes = urllib.request.urlopen(pair.controller.metrics_url).read()
    return text.decode()


def places(pair: Pair) -> dict[str, tuple[bytes, int]]:
    return {
        v.vchannel: (v.read_from, v.resolved_ts)
        for c in pair.collections().values()
        for v in c.vchannels
    }


def pause(pair: Pair) -> None:
    pair.tasks.PauseTask(task_service_pb2.PauseTaskRequest(name=TASK))
    pair.wait("paused", lambda: pair.get().state == task_pb2.TASK_STATE_PAUSED)


def resume(pair: Pair) -> None:
    pair.tasks.ResumeTask(task_service_pb2.ResumeTaskRequest(name=TASK))


def change(source: MilvusClient, first: int) -> None:
    """Ten new rows, ten changed ones, ten gone."""
    rng = random.Random(first)
    source.insert("one", [make_row(SIMPLE, rng, first + n) for n in range(10)])
    source.upsert("one", [make_row(SIMPLE, rng, n) for n in range(10)])
    source.delete("one", ids=list(range(first - 10, first)))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mq", MQS)
def test_going_back_applies_rows_again_and_ends_equal(
    stack: Stack, tmp_path: Path, mq: SourceQueue
) -> None:
    source = source_with(stack, "pos_back", "one", "two", rows=60)
    with Pair(stack, tmp_path, **QUICK) as pair:
        pair.create("pos_back.*")
        pair.wait_running("pos_back.one", "pos_back.two")
        assert pair.prove() == 120
        printed = command(pair, "positions", "-o", "json")
        early = tmp_path / "early.json"
        early.write_text(printed)
        time.sleep(1)
        at = Timestamp()
        at.GetCurrentTime()
        time.sleep(2)  # a busy source's clock is behind
        change(source, 60)
        change(source, 70)
        assert pair.prove() == 120
        pause(pair)
        late = places(pair)
        upserts = pair.collections()["pos_back.one"].rows_upserted

        # Nothing is set by a dry run; a single collection leaves the others where they are.
        wanted = ("set-positions", "--at", at.ToJsonString(), "--collection", "pos_back.one")
        assert "back" in command(pair, *wanted, "--dry-run")
        assert places(pair) == late
        command(pair, *wanted)
        now = places(pair)
        for name, moved in (("one", True), ("two", False)):
            for shard in pair.collections()[f"pos_back.{name}"].vchannels:
                assert (now[shard.vchannel] != late[shard.vchannel]) == moved
                if moved:
                    assert now[shard.vchannel][1] <= tso_after(at)
                    assert decode(now[shard.vchannel][0]) <= decode(late[shard.vchannel][0])
        resume(pair)
        pair.wait_running("pos_back.one", "pos_back.two")
        pair.wait(
            "applied again",
            lambda: pair.collections()["pos_back.one"].rows_upserted >= upserts + 20,
        )
        assert pair.prove() == 120

        pause(pair)
        command(pair, "set-positions", "--from-file", str(early))
        assert places(pair) == {
            p["vchannel"]: (base64.b64decode(p["readFrom"]), int(p["resolvedTs"]))
            for p in json.loads(printed)["positions"]
        }
        resume(pair)
        pair.wait_running("pos_back.one", "pos_back.two")
        assert pair.prove() == 120

        # To the very beginning of everything, and from a backup's checkpoints to now.
        pause(pair)
        command(pair, "set-positions", "--at", "2020-01-01T00:00:00Z")
        assert {ts for _, ts in places(pair).values()} == {0}
        checkpoints = {
            vchannel: base64.b64encode(
                msg_pb2.MsgPosition(
                    channel_name=vchannel, msgID=read_from, timestamp=ts
                ).SerializeToString()
            ).decode()
            for vchannel, (read_from, ts) in late.items()
        }
        backup = tmp_path / "full_meta.json"
        backup.write_text(
            json.dumps({"collection_backups": [{"channel_checkpoints": checkpoints}]})
        )
        command(pair, "set-positions", "--from-file", str(backup))
        assert places(pair) == late
        command(pair, "set-positions", "--at", "2020-01-01T00:00:00Z")
        resume(pair)
        pair.wait_running("pos_back.one", "pos_back.two")
        assert pair.prove() == 120
        pair.quiet()


def tso_after(at: Timestamp) -> int:
    return (at.ToMilliseconds() + 1) << 18


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mq", MQS)
def test_what_is_no_place_of_the_task_is_refused_and_nothing_is_stored(
    stack: Stack, tmp_path: Path, mq: SourceQueue
) -> None:
    source_with(stack, "pos_bad", "one", "other")
    with Pair(stack, tmp_path, **QUICK) as pair:
        pair.create("pos_bad.one")
        pair.wait_running("pos_bad.one")
        assert pair.prove() == 50
        [(vchannel, (read_from, ts))] = places(pair).items()
        other = MilvusClient(uri=stack.source.uri, db_name="pos_bad").describe_collection("other")

        def refused(reason: str, *positions: tuple[str, bytes, int], **fields: Any) -> str:
            request = task_service_pb2.SetTaskPositionsRequest(name=TASK, **fields)
            for shard, place, tick in positions:
                request.positions.positions.add(vchannel=shard, read_from=place, resolved_ts=tick)
            with pytest.raises(grpc.RpcError) as caught:
                pair.tasks.SetTaskPositions(request, timeout=60)
            assert error_info(caught.value).reason == reason, caught.value
            return str(caught.value.details())

        refused("TASK_NOT_PAUSED", (vchannel, read_from, ts))
        assert "TASK_NOT_PAUSED" in command(
            pair, "set-positions", "--at", "2026-01-01T00:00:00Z", code=3
        )
        pause(pair)
        before = places(pair)
        [(_, (read_from, ts))] = before.items()
        stranger = f"{vchannel.rpartition('_')[0]}_{other['collection_id']}v0"
        beyond = encode(decode(read_from) + 1_000_000)
        assert vchannel in refused("POSITION_NOT_FOUND", (vchannel, beyond, ts))
        assert stranger in refused("UNKNOWN_VCHANNEL", (stranger, read_from, ts))
        refused("BAD_POSITION", (vchannel, b"\x08\x01", ts))
        refused("POSITION_MISMATCH", (vchannel, read_from, ts + (86_400_000 << 18)))
        refused("POSITION_MISMATCH", (vchannel, read_from, ts - (86_400_000 << 18)))
        refused("UNKNOWN_VCHANNEL", (vchannel, read_from, ts), (stranger, read_from, ts))
        refused("VCHANNEL_TWICE", (vchannel, read_from, ts), (vchannel, read_from, ts))
        refused("INVALID_FIELD", (vchannel, b"", ts))
        soon = Timestamp(seconds=int(time.time()) + 3_600)
        refused("TIME_IN_FUTURE", at=soon)
        refused("COLLECTION_NOT_FOUND", at=Timestamp(seconds=1), collections=["pos_bad.other"])
        refused("ETAG_MISMATCH", (vchannel, read_from, ts), etag="old")
        junk = tmp_path / "junk.json"
        for text, reason in (
            ('{"positions": [{"vchannel": "v", "readFrom": "???"}]}', "BAD_POSITION"),
            ('{"something": 1}', "UNKNOWN_SHAPE"),
            (f'{{"channel_checkpoints": {{"{vchannel}": "AAAA"}}}}', "BAD_POSITION"),
        ):
            junk.write_text(text)
            assert reason in command(pair, "set-positions", "--from-file", str(junk), code=2)
        assert places(pair) == before
        resume(pair)
        pair.wait_running("pos_bad.one")
        assert pair.prove() == 50
        pair.quiet()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mq", MQS)
async def test_a_place_that_the_queue_forgets_while_paused_is_said_while_paused(
    stack: Stack, tmp_path: Path, mq: SourceQueue
) -> None:
    source = source_with(stack, "pos_lost", "one", "two")
    with Pair(stack, tmp_path, **QUICK) as pair:
        pair.create("pos_lost.*")
        pair.wait_running("pos_lost.one", "pos_lost.two")
        assert pair.prove() == 100
        [shard] = pair.collections()["pos_lost.one"].vchannels
        topic = shard.vchannel.rpartition("_")[0]
        queue = (KafkaQueue if mq == "kafka" else NatsQueue)(stack, topic)
        pair.wait(
            "retention known",
            lambda: pair.collections()["pos_lost.one"].vchannels[0].HasField("retention_left"),
        )
        [shard] = pair.collections()["pos_lost.one"].vchannels
        assert shard.read_from_text == str(decode(shard.read_from))
        limits = await queue.source.limits(topic)
        left_ms = shard.retention_left.ToMilliseconds()
        assert 0.9 * limits.max_age_ms < left_ms <= limits.max_age_ms
        metrics = await asyncio.to_thread(scrape, pair)
        name = "milvus_cdc_collection_retention_left_seconds"
        assert f'{name}{{collection="pos_lost.one",task="tasks/follow"}}' in metrics

        pause(pair)
        source.insert("one", [make_row(SIMPLE, random.Random(5), n) for n in range(500, 510)])
        await asyncio.sleep(2)
        assert pair.collections()["pos_lost.one"].state == task_pb2.COLLECTION_STATE_PAUSED
        found = await queue.source.log_range(topic)
        await queue.truncate(queue.source.back(found.end, 1))
        await queue.source.close()
        lost = [
            name
            for name, c in pair.collections().items()
            if any(v.vchannel.rpartition("_")[0] == topic for v in c.vchannels)
        ]
        pair.wait(
            "failed while paused",
            lambda: all(pair.collections()[name].state == FAILED for name in lost),
        )
        assert pair.get().state == task_pb2.TASK_STATE_PAUSED
        one = pair.collections()["pos_lost.one"]
        assert one.reason == "LOG_TRUNCATED"
        assert shard.vchannel.rpartition("_")[0] in one.message
        assert "esync" in one.message
        for name in set(pair.collections()) - set(lost):
            assert pair.collections()[name].state == task_pb2.COLLECTION_STATE_PAUSED
        pair.quiet('"event": "collection failed"', "LOG_TRUNCATED", '"event": "retention')
