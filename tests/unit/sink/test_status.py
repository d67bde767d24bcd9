"""What a Milvus answer means: whether it happened, and who can help."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from milvus_cdc import milvus_status
from milvus_cdc.errors import RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.milvus_client import MilvusClient
from pymilvus.grpc_gen import common_pb2


def meaning(writes: bool, **status: Any) -> Exception:
    with pytest.raises(milvus_status.Refusal) as refused:
        milvus_status.check("Insert", common_pb2.Status(**status))
    return milvus_status.from_refusal("SINK", "http://here", refused.value, writes=writes)


def test_success_is_no_error() -> None:
    milvus_status.check("Insert", common_pb2.Status())


# As 2.3.5 answered, and codes of 2.2 and 2.4 and 2.5.
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"code": 100, "error_code": 4, "reason": "collection not found"}, "COLLECTION_MISSING"),
        ({"code": 100, "reason": "can't find collection"}, "COLLECTION_MISSING"),
        ({"code": 800, "reason": "database not found"}, "COLLECTION_MISSING"),
        ({"error_code": 4, "reason": "collection gone"}, "COLLECTION_MISSING"),
        ({"code": 200, "reason": "partition not found[partition=p]"}, "PARTITION_MISSING"),
        ({"code": 101, "reason": "collection not loaded"}, "NOT_LOADED"),
        ({"code": 1100, "error_code": 5, "reason": "num_rows of field"}, "REFUSED"),
        ({"code": 1102, "reason": "parameter too large"}, "REFUSED"),
        ({"code": 801, "reason": "exceeded the limit number of database"}, "LIMIT"),
        ({"code": 1303, "reason": "deny to write the message to mq"}, "READ_ONLY"),
        ({"code": 1401, "reason": "privilege not permitted"}, "PERMISSION_DENIED"),
        ({"code": 1400, "reason": "not authenticated"}, "UNAUTHENTICATED"),
    ],
)
def test_what_only_a_person_can_mend(status: dict[str, Any], reason: str) -> None:
    for writes in (True, False):
        error = meaning(writes, **status)
        assert isinstance(error, UserError)
        assert error.reason == f"SINK_{reason}"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"code": 8, "error_code": 49, "reason": "request is rejected"}, "RATE_LIMITED"),
        ({"error_code": 49, "reason": "rejected by grpc RateLimiter"}, "RATE_LIMITED"),
        ({"code": 9, "reason": "quota exceeded[reason=memory]"}, "QUOTA"),
        ({"error_code": 54, "reason": "disk"}, "QUOTA"),
    ],
)
def test_what_is_refused_at_the_door_did_not_happen(status: dict[str, Any], reason: str) -> None:
    error = meaning(True, **status)
    assert isinstance(error, RetryableError)
    assert not isinstance(error, UnknownOutcomeError)
    assert error.reason == f"SINK_{reason}"


@pytest.mark.parametrize(
    "status",
    [
        {"code": 1, "reason": "service not ready"},
        {"code": 2, "reason": "service unavailable"},
        {"code": 5, "reason": "service internal error"},
        {"code": 65535, "reason": "something nobody has thought of"},
        {"code": 1302, "reason": "message queue internal error"},
        {"code": 10001, "reason": "context deadline exceeded"},
        {"code": 4711, "reason": "a code of a later version"},
        {"error_code": 1, "reason": "2.2 says only this"},
    ],
)
def test_what_may_have_happened_halfway_is_unknown(status: dict[str, Any]) -> None:
    assert isinstance(meaning(True, **status), UnknownOutcomeError)
    error = meaning(False, **status)
    assert isinstance(error, RetryableError)
    assert not isinstance(error, UnknownOutcomeError)


def rpc(code: grpc.StatusCode, details: str, *, writes: bool = True) -> Exception:
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    return milvus_status.from_rpc("SINK", "http://here", "Insert", error, writes=writes)


def test_broken_calls() -> None:
    unavailable, deadline = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(rpc(unavailable, "Socket closed"), UnknownOutcomeError)
    assert isinstance(rpc(deadline, "Deadline Exceeded"), UnknownOutcomeError)
    assert isinstance(rpc(grpc.StatusCode.INTERNAL, "?"), UnknownOutcomeError)
    never = rpc(unavailable, "failed to connect to all addresses; last error: refused")
    assert isinstance(never, RetryableError)
    assert not isinstance(never, UnknownOutcomeError)
    assert not isinstance(rpc(deadline, "", writes=False), UnknownOutcomeError)
    for code in (
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    ):
        assert isinstance(rpc(code, ""), UserError)


@pytest.mark.parametrize(
    "uri",
    ["", "127.0.0.1:19530", "tcp://a:1", "http://", "http://a:b", "http://a/db", "http://u:p@a"],
)
async def test_an_address_that_is_none_is_refused(uri: str) -> None:
    with pytest.raises(UserError) as failed:
        MilvusClient(uri)
    assert (failed.value.reason, failed.value.field) == ("SINK_URI_INVALID", "sink.milvus.uri")


@pytest.mark.parametrize(
    "uri", ["http://a:1", "http://a", "https://a", "http://[::1]:5", "http://a/"]
)
async def test_addresses(uri: str) -> None:
    async with MilvusClient(uri, "root:x") as client:
        assert client.uri == uri
