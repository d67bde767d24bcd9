"""The calls of etcd's v3 API that this project makes, over several endpoints, each with a deadline.

Laws: reads are linearizable; a listing of any size is of one revision; foreign errors never leave:
RetryableError ETCD_UNAVAILABLE (UnknownOutcomeError when a write may have happened), UserError
ETCD_AUTH, Compacted, BugError.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import grpc.aio
from milvuscdc.internal import etcd_rpc_pb2 as pb
from milvuscdc.internal import etcd_rpc_pb2_grpc as rpc

from milvus_cdc.errors import RetryableError
from milvus_cdc.etcd.connection import Connection
from milvus_cdc.etcd.login import EtcdSecurity, Metadata
from milvus_cdc.etcd.records import (
    Answer,
    Compare,
    CompareOp,
    CompareTarget,
    CompareValue,
    Deleted,
    DeleteOp,
    GetOp,
    KeyRange,
    KeyValue,
    LeaseGrant,
    Listing,
    PutOp,
    TxnAnswer,
    encode_key,
)
from milvus_cdc.etcd.watching import Watch

_RESULTS = {
    CompareOp.EQUAL: pb.Compare.EQUAL,
    CompareOp.NOT_EQUAL: pb.Compare.NOT_EQUAL,
    CompareOp.LESS: pb.Compare.LESS,
    CompareOp.GREATER: pb.Compare.GREATER,
}


class EtcdClient:
    """A client of one etcd cluster, for many tasks of one event loop; `async with` closes it."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        security: EtcdSecurity | None = None,
        call_seconds: float = 5.0,
        page_keys: int = 2000,
        watch_idle_seconds: float = 10.0,
    ) -> None:
        self._connection = Connection(endpoints, security or EtcdSecurity())
        self._call_seconds = call_seconds
        self._page_keys = page_keys
        self._watch_idle_seconds = watch_idle_seconds

    async def __aenter__(self) -> EtcdClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connection.close()

    async def version(self) -> str:
        """The version of the etcd server that answers first."""

        async def attempt(
            channel: grpc.aio.Channel, timeout: float, metadata: Metadata
        ) -> pb.StatusResponse:
            return await rpc.MaintenanceStub(channel).Status(
                pb.StatusRequest(), timeout=timeout, metadata=metadata
            )

        return (await self._connection.call(attempt, self._call_seconds)).version

    async def get(self, key: str) -> Listing:
        """One key, or none. The answer's revision is a fresh one: no earlier write is missed."""
        return await self.list(KeyRange.key(key))

    async def list(self, *ranges: KeyRange, revision: int = 0) -> Listing:
        """All keys of the ranges, in order, at one revision: that given, else the newest.

        Raises Compacted when the revision goes away meanwhile.
        """
        kvs: list[KeyValue] = []
        cluster_id = 0
        for keys in ranges:
            start, more = keys.start, True
            while more:
                request = pb.RangeRequest(
                    key=start,
                    range_end=keys.end,
                    limit=self._page_keys,
                    revision=revision,
                    keys_only=keys.keys_only,
                )
                page = await self._range(request)
                # Later pages answer with the revision of their own time, so the first one counts.
                revision = revision or page.header.revision
                cluster_id = cluster_id or page.header.cluster_id
                if page.header.cluster_id != cluster_id:
                    raise RetryableError(
                        "ETCD_UNAVAILABLE", "endpoints belong to different etcd clusters"
                    )
                kvs.extend(KeyValue.of(kv) for kv in page.kvs)
                more = page.more and bool(page.kvs)
                if more:
                    start = page.kvs[-1].key + b"\0"
        return Listing(cluster_id, revision, tuple(kvs))

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> Answer:
        request = pb.PutRequest(key=encode_key(key), value=value, lease=lease)

        async def attempt(
            channel: grpc.aio.Channel, timeout: float, metadata: Metadata
        ) -> pb.PutResponse:
            return await rpc.KVStub(channel).Put(request, timeout=timeout, metadata=metadata)

        header = (await self._connection.call(attempt, self._call_seconds, write=True)).header
        return Answer(header.cluster_id, header.revision)

    async def delete(self, keys: KeyRange) -> Deleted:
        request = pb.DeleteRangeRequest(key=keys.start, range_end=keys.end)

        async def attempt(
            channel: grpc.aio.Channel, timeout: float, metadata: Metadata
        ) -> pb.DeleteRangeResponse:
            return await rpc.KVStub(channel).DeleteRange(
                request, timeout=timeout, metadata=metadata
            )

        response = await self._connection.call(attempt, self._call_seconds, write=True)
        return Deleted(response.header.cluster_id, response.header.revision, response.deleted)

    async def txn(
        self,
        compare: Sequence[Compare | CompareValue],
        then: Sequence[PutOp | DeleteOp | GetOp],
        otherwise: Sequence[PutOp | DeleteOp | GetOp] = (),
    ) -> TxnAnswer:
        """All conditions and operations at one revision. etcd allows 128 operations
        (--max-txn-ops).
        """
        request = pb.TxnRequest(
            compare=[_compare(condition) for condition in compare],
            success=[_operation(op) for op in then],
            failure=[_operation(op) for op in otherwise],
        )
        write = any(not isinstance(op, GetOp) for op in (*then, *otherwise))

        async def attempt(
            channel: grpc.aio.Channel, timeout: float, metadata: Metadata
        ) -> pb.TxnResponse:
            return await rpc.KVStub(channel).Txn(request, timeout=timeout, metadata=metadata)

        response = await self._connection.call(attempt, self._call_seconds, write=write)
        return TxnAnswer(
            response.header.cluster_id,
            response.header.revision,
            response.succeeded,
            tuple(
                tuple(KeyValue.of(kv) for kv in result.response_range.kvs)
                for result in response.responses
            ),
        )

    async def grant_lease(self, ttl_seconds: int) -> LeaseGrant:
        """A new lease. One granted without our knowing ends by itself, so this is tried on every
        endpoint.
        """

        async def attempt(
            channel: grpc.aio.Channel, timeout: float, metadata: Metadata
        ) -> pb.LeaseGrantResponse:
            request = pb.LeaseGrantRequest(TTL=ttl_seconds)
            return await rpc.LeaseStub(channel).LeaseGrant(
                request, timeout=timeout, metadata=metadata
            )

        granted = await self._connection.call(attempt, self._call_seconds)
        return LeaseGrant(
            granted.header.cluster_id, granted.header.revision, granted.ID, granted.TTL
        )

    async def keep_alive(self, lease: int) -> int:
        """Renews a lease once; its seconds from now, or 0 when it is gone."""

        async def attempt(channel: grpc.aio.Channel, timeout: float, metadata: Metadata) -> int:
            call = rpc.LeaseStub(channel).LeaseKeepAlive(timeout=timeout, metadata=metadata)
            try:
                await call.write(pb.LeaseKeepAliveRequest(ID=lease))
                answer = await call.read()
            finally:
                call.cancel()
            if not isinstance(answer, pb.LeaseKeepAliveResponse):
                raise RetryableError("ETCD_UNAVAILABLE", "etcd ended a lease's keep-alive stream")
            return max(0, answer.TTL)

        return await self._connection.call(attempt, self._call_seconds)

    async def revoke_lease(self, lease: int) -> None:
        """Ends a lease and deletes its keys; succeeds when it is gone already."""

        async def attempt(channel: grpc.aio.Channel, timeout: float, metadata: Metadata) -> None:
            request = pb.LeaseRevokeRequest(ID=lease)
            try:
                await rpc.LeaseStub(channel).LeaseRevoke(
                    request, timeout=timeout, metadata=metadata
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise

        await self._connection.call(attempt, self._call_seconds)

    def watch(self, *ranges: KeyRange, start_revision: int) -> Watch:
        """Events of the ranges from `start_revision` on, itself included. Connects at its first
        `next`.
        """
        return Watch(
            self._connection,
            ranges,
            start_revision,
            idle_seconds=self._watch_idle_seconds,
            answer_seconds=self._call_seconds,
        )

    async def _range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        async def attempt(
            channel: grpc.aio.Channel, timeout: float, metadata: Metadata
        ) -> pb.RangeResponse:
            return await rpc.KVStub(channel).Range(request, timeout=timeout, metadata=metadata)

        return await self._connection.call(attempt, self._call_seconds)


def _compare(condition: Compare | CompareValue) -> pb.Compare:
    key, result = encode_key(condition.key), _RESULTS[condition.op]
    if isinstance(condition, CompareValue):
        return pb.Compare(key=key, target=pb.Compare.VALUE, value=condition.value, result=result)
    number = condition.number
    match condition.target:
        case CompareTarget.MOD_REVISION:
            return pb.Compare(key=key, target=pb.Compare.MOD, mod_revision=number, result=result)
        case CompareTarget.CREATE_REVISION:
            return pb.Compare(
                key=key, target=pb.Compare.CREATE, create_revision=number, result=result
            )
        case CompareTarget.VERSION:
            return pb.Compare(key=key, target=pb.Compare.VERSION, version=number, result=result)
        case CompareTarget.LEASE:
            return pb.Compare(key=key, target=pb.Compare.LEASE, lease=number, result=result)


def _operation(op: PutOp | DeleteOp | GetOp) -> pb.RequestOp:
    if isinstance(op, PutOp):
        put = pb.PutRequest(key=encode_key(op.key), value=op.value, lease=op.lease)
        return pb.RequestOp(request_put=put)
    if isinstance(op, DeleteOp):
        delete = pb.DeleteRangeRequest(key=op.range.start, range_end=op.range.end)
        return pb.RequestOp(request_delete_range=delete)
    get = pb.RangeRequest(key=op.range.start, range_end=op.range.end, keys_only=op.range.keys_only)
    return pb.RequestOp(request_range=get)
