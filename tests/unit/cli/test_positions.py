"""Positions as people and other tools write them, and what becomes of them."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from milvus_cdc.cli.position_file import FilePosition, parse_positions
from milvus_cdc.cli.task_file import InputError
from milvus_cdc.milvus_protos import msg_pb2
from milvus_cdc.model import ms_to_tso
from milvus_cdc.source.positions import encode
from milvuscdc.v1 import task_pb2, task_service_pb2

from tests.unit.cli.test_command import Api, api  # noqa: F401

PCHANNEL = "by-dev-rootcoord-dml_3"
VCHANNEL = f"{PCHANNEL}_450v0"
OTHER = "by-dev-rootcoord-dml_4_451v0"
TS = ms_to_tso(1_700_000_000_000)


def encoded(channel: str = VCHANNEL, ts: int = TS, number: int = 7) -> str:
    position = msg_pb2.MsgPosition(
        channel_name=channel, msgID=encode(number), msgGroup="datanode-1-x-true", timestamp=ts
    )
    return base64.b64encode(position.SerializeToString()).decode()


GOOD = FilePosition(VCHANNEL, encode(7), TS)
GOOD_FILES: list[tuple[Any, FilePosition]] = [
    ({"channel_checkpoints": {VCHANNEL: encoded()}}, GOOD),
    ({"channelCheckpoints": {VCHANNEL: encoded()}}, GOOD),
    ({"infos": [{"id": "1", "channel_checkpoints": {VCHANNEL: encoded()}}]}, GOOD),
    ({"name": "b", "collection_backups": [{"channel_checkpoints": {VCHANNEL: encoded()}}]}, GOOD),
    ({"code": 0, "data": {"collection_backups": [{"channel_checkpoints": {VCHANNEL: encoded()}}]}},
     GOOD),
    ({"channel_checkpoints": {VCHANNEL: encoded(PCHANNEL)}}, GOOD),
    ({"collection_infos": [{"name": "c", "positions": {VCHANNEL: encoded()}}]}, GOOD),
    ({"request_type": "create",
      "request_data": {"collection_infos": [{"name": "c", "positions": {VCHANNEL: encoded()}}]}},
     GOOD),
    ({"positions": {VCHANNEL: encoded()}}, GOOD),
    ({"positions": [{"collection_id": 450, "channel_name": PCHANNEL, "time": 1, "tt": TS,
                     "msg_id": encoded(PCHANNEL, ts=0)}], "op_positions": [],
      "target_positions": []},
     FilePosition(PCHANNEL, encode(7), TS, 450)),
    ({"task": "tasks/t", "positions": [
        {"vchannel": VCHANNEL, "readFrom": base64.b64encode(encode(7)).decode(),
         "resolvedTs": str(TS), "time": "2023-11-14T22:13:20.000Z"}]},
     FilePosition(VCHANNEL, encode(7), TS, own=True)),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), GOOD_FILES)
def test_every_known_shape_is_read(data: Any, expected: FilePosition) -> None:
    assert parse_positions(json.dumps(data, indent="\t")) == [expected]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"channel_checkpoints": {VCHANNEL: "no base64!"}}, "BAD_POSITION"),
        ({"channel_checkpoints": {VCHANNEL: ""}}, "BAD_POSITION"),
        ({"channel_checkpoints": {VCHANNEL: "////"}}, "BAD_POSITION"),
        ({"channel_checkpoints": {VCHANNEL: encoded(OTHER)}}, "POSITION_OF_OTHER_CHANNEL"),
        ({"positions": [{"vchannel": VCHANNEL, "readFrom": "AA==", "resolvedTs": "soon"}]},
         "BAD_POSITION"),
        ({"positions": [{"vchannel": VCHANNEL, "readFrom": "AA==", "resolvedTs": 1 << 64}]},
         "BAD_POSITION"),
        ({"positions": []}, "UNKNOWN_SHAPE"),
        ({"tasks": []}, "UNKNOWN_SHAPE"),
        ([], "UNKNOWN_SHAPE"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(data: Any, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_positions(json.dumps(data))
    assert caught.value.reason == reason
    if reason != "UNKNOWN_SHAPE":
        assert VCHANNEL in caught.value.message
    with pytest.raises(InputError, match="neither JSON nor YAML"):
        parse_positions("{")


def follow(api: Api) -> None:  # noqa: F811
    """A task with two shards of one collection."""
    api.tasks.tasks["tasks/t"] = task_pb2.Task(name="tasks/t")
    api.tasks.collections = [
        task_pb2.TaskCollection(
            database="default",
            collection="c",
            collection_id=450,
            vchannels=[
                task_pb2.VchannelProgress(
                    vchannel=VCHANNEL,
                    read_from=encode(9),
                    read_from_text="9",
                    resolved_ts=TS + (5_000 << 18),
                    retention_left=Duration(seconds=7_200),
                    retention_left_bytes=-1,
                ),
                task_pb2.VchannelProgress(vchannel=f"{PCHANNEL}_450v1", closed=True),
            ],
        )
    ]


async def test_what_is_printed_can_be_given_back(api: Api) -> None:  # noqa: F811
    follow(api)
    table = await api.run("task", "positions", "t")
    assert table.code == 0
    assert f"default.c   {VCHANNEL}  9 " in table.out
    assert "2023-11-14T22:13:25.000Z" in table.out
    assert "2.00 h" in table.out
    assert "450v1" not in table.out
    for form in ("json", "yaml"):
        printed = await api.run("task", "positions", "t", "-o", form)
        done = await api.run("task", "set-positions", "t", "--from-file", "-", text=printed.out)
        assert done.code == 0, done.err
        request = api.tasks.requests[-1]
        assert request == task_service_pb2.SetTaskPositionsRequest(
            name="tasks/t",
            positions=task_service_pb2.PositionList(
                positions=[
                    task_service_pb2.VchannelPosition(
                        vchannel=VCHANNEL, read_from=encode(9), resolved_ts=TS + (5_000 << 18)
                    )
                ]
            ),
        )


async def test_others_speak_of_more_than_the_task_follows(api: Api) -> None:  # noqa: F811
    follow(api)
    both = {"channel_checkpoints": {VCHANNEL: encoded(), OTHER: encoded(OTHER)}}
    done = await api.run(
        "task", "set-positions", "t", "--from-file", "-", "--dry-run", text=json.dumps(both)
    )
    assert done.code == 0, done.err
    assert api.tasks.requests[-1].validate_only
    assert [p.vchannel for p in api.tasks.requests[-1].positions.positions] == [VCHANNEL]
    assert f"left out: {OTHER}" in done.err
    assert "back 5.0 s: rows in between are applied again" in done.out
    assert "nothing was set" in done.out
    # One position of a pchannel is meant for every shard there.
    of_topic = {"positions": [{"channel_name": PCHANNEL, "msg_id": encoded(PCHANNEL, number=3)}]}
    done = await api.run(
        "task", "set-positions", "t", "--from-file", "-", text=json.dumps(of_topic)
    )
    assert done.code == 0, done.err
    assert [(p.vchannel, p.read_from) for p in api.tasks.requests[-1].positions.positions] == [
        (VCHANNEL, encode(3))
    ]
    sent = len(api.tasks.requests)
    strange = {"channel_checkpoints": {OTHER: encoded(OTHER)}}
    done = await api.run("task", "set-positions", "t", "--from-file", "-", text=json.dumps(strange))
    assert (done.code, len(api.tasks.requests)) == (2, sent)
    assert "UNKNOWN_VCHANNEL" in done.err


async def test_a_time_needs_its_zone(api: Api) -> None:  # noqa: F811
    follow(api)
    for bad in ("yesterday", "2026-11-21 10:00:00"):
        done = await api.run("task", "set-positions", "t", "--at", bad)
        assert done.code == 2
        assert "INVALID_TIME" in done.err
    done = await api.run(
        "task", "set-positions", "t", "--at", "2026-11-21T10:30:00+01:00", "--collection", "a.b"
    )
    assert done.code == 0, done.err
    request = api.tasks.requests[-1]
    assert request.at.ToJsonString() == "2026-11-21T09:30:00Z"
    assert list(request.collections) == ["a.b"]
    done = await api.run("task", "set-positions", "t")
    assert done.code == 2
    done = await api.run("task", "set-positions", "t", "--from-file", "x", "--collection", "a.b")
    assert done.code == 2
