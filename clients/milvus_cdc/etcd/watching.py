"""A watch on ranges of keys that survives broken connections.

Laws: every event after the start revision is delivered once and in order per range, or an error
says why not; after any RetryableError except Compacted and WatchLost the watch stands where it
stood and `next` may be called again; a server that has gone silent is noticed by an unanswered
progress request, because etcd's own progress notifications come only every ten minutes. A watch is
begun only with a token that etcd took just before: etcd before 3.5.6 cancels one with an old token
as if its user lacked the right, and one that runs goes on when its token ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import grpc.aio
from milvuscdc.internal import etcd_rpc_pb2 as pb
from milvuscdc.internal import etcd_rpc_pb2_grpc as rpc

from milvus_cdc.errors import BugError, RetryableError, UserError
from milvus_cdc.etcd.connection import Connection, refused, to_cdc_error
from milvus_cdc.etcd.login import Metadata
from milvus_cdc.etcd.records import (
    Compacted,
    KeyRange,
    WatchBatch,
    WatchEvent,
    WatchLost,
    decode_key,
)

_Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]"

# A member cut off from its cluster ends the stream instead of staying silent
# (etcd `rpctypes.MetadataRequireLeaderKey`).
_METADATA = (("hasleader", "true"),)


@dataclass(slots=True)
class _Watched:
    keys: KeyRange
    next_revision: int
    fragments: list[WatchEvent] = field(default_factory=list)


class Watch:
    """Events of some ranges from a revision on. Made by `EtcdClient.watch`; used by one task; close
    it.
    """

    def __init__(
        self,
        connection: Connection,
        ranges: Sequence[KeyRange],
        start_revision: int,
        *,
        idle_seconds: float,
        answer_seconds: float,
    ) -> None:
        self._connection = connection
        self._watched = [_Watched(keys, start_revision) for keys in ranges]
        self._idle_seconds = idle_seconds
        self._answer_seconds = answer_seconds
        self._cluster_id = 0
        self._call: _Call | None = None
        self._holding = ExitStack()
        """The channel of the call."""
        self._endpoint = ""
        self._reading: asyncio.Task[Any] | None = None
        self._answer_due = False

    async def next(self) -> WatchBatch:
        """The next events. May be cancelled without losing any.

        Raises Compacted or WatchLost (list again, then make a new watch), RetryableError when no
        endpoint serves the watch now (call again), UserError ETCD_AUTH.
        """
        broken: RetryableError | None = None
        for _ in range(len(self._connection.endpoints) + 1):
            try:
                if self._call is None:
                    await self._connect()
                while True:
                    batch = self._accept(await self._read())
                    if batch is not None:
                        return batch
            except grpc.aio.AioRpcError as error:
                failure = to_cdc_error(error, self._endpoint, self._connection.fields)
                if not isinstance(failure, RetryableError):
                    self._hang_up()
                    raise failure from error
                failure.__cause__ = error
                broken = failure
            except (Compacted, WatchLost, UserError, BugError):
                self._hang_up()
                raise
            except RetryableError as error:
                broken = error
            self._hang_up()
            if self._connection.endpoint() == self._endpoint:
                self._connection.next_endpoint()
        assert broken is not None
        fault = await self._connection.blame(self._endpoint, broken, self._answer_seconds)
        if fault is not None:
            raise fault from broken
        raise broken

    async def close(self) -> None:
        reading = self._reading
        self._hang_up()
        if reading is not None:
            await asyncio.wait({reading})

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self._call = None
        self._reading = None
        self._holding.close()
        for watched in self._watched:
            watched.fragments.clear()

    async def _connect(self) -> None:
        if self._connection.logs_in:
            await self._prove_token()
        self._endpoint = self._connection.endpoint()
        channel = self._holding.enter_context(self._connection.use())
        metadata = await self._connection.metadata(channel, self._answer_seconds)
        self._call = rpc.WatchStub(channel).Watch(metadata=(*_METADATA, *metadata))
        self._answer_due = True
        for watch_id, watched in enumerate(self._watched, start=1):
            create = pb.WatchCreateRequest(
                key=watched.keys.start,
                range_end=watched.keys.end,
                start_revision=watched.next_revision,
                watch_id=watch_id,
                progress_notify=True,
                fragment=True,
            )
            await self._send(pb.WatchRequest(create_request=create))

    async def _prove_token(self) -> None:
        """Has it replaced if etcd does not take it any more."""
        request = pb.RangeRequest(key=self._watched[0].keys.start, keys_only=True, limit=1)

        async def attempt(
            channel: grpc.aio.Channel, timeout: float, metadata: Metadata
        ) -> pb.RangeResponse:
            return await rpc.KVStub(channel).Range(request, timeout=timeout, metadata=metadata)

        self._endpoint = self._connection.endpoint()
        await self._connection.call(attempt, self._answer_seconds)

    async def _send(self, request: pb.WatchRequest) -> None:
        assert self._call is not None
        try:
            async with asyncio.timeout(self._answer_seconds):
                await self._call.write(request)
        except TimeoutError as error:
            raise self._silent() from error
        except asyncio.InvalidStateError as error:
            raise RetryableError(
                "ETCD_UNAVAILABLE", f"etcd at {self._endpoint} ended a watch"
            ) from error

    def _silent(self) -> RetryableError:
        return RetryableError(
            "ETCD_UNAVAILABLE",
            f"etcd at {self._endpoint} said nothing on a watch for {self._answer_seconds:g} s",
        )

    async def _read(self) -> pb.WatchResponse:
        while True:
            assert self._call is not None
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._call.read())
                self._reading.add_done_callback(_retrieve)
            patience = self._answer_seconds if self._answer_due else self._idle_seconds
            done, _ = await asyncio.wait({self._reading}, timeout=patience)
            if not done:
                if self._answer_due:
                    raise self._silent()
                self._answer_due = True
                await self._send(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
                continue
            reading, self._reading = self._reading, None
            if reading.cancelled() or reading.result() is grpc.aio.EOF:
                raise RetryableError("ETCD_UNAVAILABLE", f"etcd at {self._endpoint} ended a watch")
            self._answer_due = False
            response: pb.WatchResponse = reading.result()
            return response

    def _accept(self, response: pb.WatchResponse) -> WatchBatch | None:
        """Takes note of an answer; events that make up whole revisions are returned."""
        if response.canceled:
            raise self._cancelled(response)
        header = response.header
        self._cluster_id = self._cluster_id or header.cluster_id
        if header.cluster_id != self._cluster_id:
            raise WatchLost(
                f"etcd at {self._endpoint} is cluster {header.cluster_id:x},"
                f" not {self._cluster_id:x}"
            )
        if not 1 <= response.watch_id <= len(self._watched):
            # The answer to a progress request. Its revision is not to be trusted: before 3.5.8 etcd
            # sent it ahead of events that were still under way.
            return None
        watched = self._watched[response.watch_id - 1]
        if response.created:
            if header.revision < watched.next_revision - 1:
                raise WatchLost(
                    f"etcd at {self._endpoint} is at revision {header.revision}, before the watch"
                    f" ({watched.next_revision}): it lags, or lost its past"
                )
            return None
        watched.fragments.extend(
            WatchEvent(
                decode_key(event.kv.key),
                None if event.type == pb.Event.DELETE else event.kv.value,
                event.kv.mod_revision,
            )
            for event in response.events
        )
        if response.fragment:
            return None
        if not watched.fragments:
            watched.next_revision = max(watched.next_revision, header.revision + 1)
            return None
        events = tuple(watched.fragments)
        watched.fragments.clear()
        watched.next_revision = events[-1].mod_revision + 1
        return WatchBatch(header.cluster_id, events[-1].mod_revision, events)

    def _cancelled(self, response: pb.WatchResponse) -> Exception:
        if response.compact_revision:
            return Compacted(response.compact_revision)
        reason = response.cancel_reason or "no reason given"
        if "permission denied" in reason or "auth" in reason:
            return refused(self._endpoint, f"a watch: {reason}", self._connection.fields)
        return RetryableError(
            "ETCD_UNAVAILABLE", f"etcd at {self._endpoint} cancelled a watch: {reason}"
        )


def _retrieve(task: asyncio.Task[Any]) -> None:
    """A read that nobody waits for any more must not be reported as an unhandled error."""
    if not task.cancelled():
        task.exception()
