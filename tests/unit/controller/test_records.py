"""What a store holds stays readable by later versions, and is left alone by earlier ones."""

from __future__ import annotations

import json

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc_controller.core.collection import Checkpoint, CollectionProgress
from milvus_cdc_controller.store.records import FORMAT_VERSION, decode, encode

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


def test_a_newer_format_is_refused() -> None:
    body = json.loads(encode(PROGRESS)) | {"format_version": FORMAT_VERSION + 1}
    with pytest.raises(UserError, match="STORE_TOO_NEW"):
        decode(KEY, json.dumps(body).encode())
