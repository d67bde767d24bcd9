"""What a store holds stays readable by later versions, and is left alone by earlier ones."""

from __future__ import annotations

import json

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.model import RateLimits
from milvus_cdc_controller.core.collection import Checkpoint, CollectionProgress
from milvus_cdc_controller.core.task import TaskRecord
from milvus_cdc_controller.store.records import FORMAT_VERSION, decode, encode

from tests.unit.controller.world import Script, spec

KEY = "checkpoints/uid/7"
POINT = Checkpoint("v0", "p0", b"\x05", 5, 9, False, b"topic")
PROGRESS = CollectionProgress("uid", 7, (POINT,), 3)


def test_a_record_comes_back_as_it_was() -> None:
    assert decode(KEY, encode(PROGRESS)) == PROGRESS


def test_a_checkpoint_of_the_first_format_has_no_topic_yet() -> None:
    body = json.loads(encode(PROGRESS))
    body["format_version"] = 1
    for point in body["checkpoints"]:
        del point["incarnation"]
    record = decode(KEY, json.dumps(body).encode())
    assert isinstance(record, CollectionProgress)
    assert record.checkpoints == (Checkpoint("v0", "p0", b"\x05", 5, 9),)


def test_limits_of_an_earlier_format_bound_neither_requests_nor_connections() -> None:
    script = Script()
    script.create(spec(limits=RateLimits(5, 6, 7, 8, 4)))
    task = script.stored["tasks/uid-copy"]
    assert decode("tasks/uid-copy", encode(task)) == task
    body = json.loads(encode(task)) | {"format_version": 7}
    for name in ("requests_in_flight", "connections", "connections_each"):
        del body["spec"]["limits"][name]
    older = decode("tasks/uid-copy", json.dumps(body).encode())
    assert isinstance(older, TaskRecord)
    assert older.spec.limits == RateLimits(5, 6)


def test_a_newer_format_is_refused() -> None:
    body = json.loads(encode(PROGRESS)) | {"format_version": FORMAT_VERSION + 1}
    with pytest.raises(UserError, match="STORE_TOO_NEW"):
        decode(KEY, json.dumps(body).encode())
