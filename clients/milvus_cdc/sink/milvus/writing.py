"""Rows into a Milvus: inserts, upserts and deletes of one batch, as the server can.

Laws: a call returns when every row is acknowledged; once a part of a batch may be there, whatever
ends the call is UnknownOutcomeError; no request is sent whose time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from milvus_cdc.errors import RetryableError, RowRefusedError, UnknownOutcomeError
from milvus_cdc.milvus_client import MessageTooLargeError, MilvusClient
from milvus_cdc.milvus_status import MilvusStatusError
from milvus_cdc.sink import DeleteBatch, Op, RowBatch
from milvus_cdc.sink.milvus import capabilities as able
from milvus_cdc.sink.milvus import requests


class RowWriter:
    """Of one server."""

    def __init__(
        self, client: MilvusClient, capabilities: Callable[[], Awaitable[able.Capabilities]]
    ) -> None:
        self._client = client
        self._capabilities = capabilities
        self._writers: dict[tuple[str, str], asyncio.Lock] = {}

    async def write(
        self, target: requests.MilvusTarget, batch: RowBatch | DeleteBatch, timeout_seconds: float
    ) -> None:
        deadline = time.monotonic() + timeout_seconds
        known = await self._capabilities()
        if known.unsafe_in_keys:
            keys = batch.keys if isinstance(batch, DeleteBatch) else requests.keys_of(target, batch)
            known.check_keys(f"{target.database}.{target.collection}", keys)
        async with self._writing(known, target.database, target.collection):
            if isinstance(batch, DeleteBatch):
                await self._delete(known, target, batch, deadline)
                return
            if batch.op is Op.UPSERT and not known.upsert:
                batch = await self._make_room(known, target, batch, deadline)
            await self._write_rows(target, batch, deadline)

    def _writing(
        self, known: able.Capabilities, database: str, collection: str
    ) -> contextlib.AbstractAsyncContextManager[Any]:
        if not known.serial_writes:
            return contextlib.nullcontext()
        return self._writers.setdefault((database, collection), asyncio.Lock())

    async def _delete(
        self,
        known: able.Capabilities,
        target: requests.MilvusTarget,
        batch: DeleteBatch,
        deadline: float,
    ) -> None:
        for request in requests.delete_requests(target, batch, sums=known.constant_sums):
            await self._send("Delete", target, request, deadline)

    async def _make_room(
        self,
        known: able.Capabilities,
        target: requests.MilvusTarget,
        batch: RowBatch,
        deadline: float,
    ) -> RowBatch:
        """The rows of an upsert as inserts, once their keys are gone from the partition that an
        upsert would have looked in.

        Whatever ends this in between is repeated as an upsert, which begins with the deletes again:
        a delete takes only rows older than itself, so at the end each key is there once.
        """
        await self._delete(
            known, target, DeleteBatch(batch.partition, requests.keys_of(target, batch)), deadline
        )
        return RowBatch(Op.INSERT, batch.partition, batch.chunks)

    async def _write_rows(
        self, target: requests.MilvusTarget, batch: RowBatch, deadline: float
    ) -> None:
        waiting = requests.split_rows(batch, requests.REQUEST_BYTES_MAX)[::-1]
        written = False
        while waiting:
            part = waiting.pop()
            if not part.num_rows:
                continue
            try:
                await self._write_part(target, part, deadline)
            except MessageTooLargeError as error:
                halves = requests.halve_rows(part)
                if len(halves) == 1:
                    raise RowRefusedError(
                        "SINK_ROW_TOO_LARGE",
                        f"one row of {target.database}.{target.collection} exceeds what the sink "
                        f"takes ({error}); raise proxy.grpc.serverMaxRecvSize there",
                    ) from error
                waiting += halves[::-1]
            except UnknownOutcomeError:
                raise
            except MilvusStatusError as error:
                if error.reason != "SINK_REFUSED":
                    raise
                raise RowRefusedError(error.reason, error.message) from error
            except RetryableError as error:
                if written:
                    # An earlier part of the same batch is there already.
                    raise UnknownOutcomeError(error.reason, error.message) from error
                raise
            else:
                written = True

    async def _write_part(
        self, target: requests.MilvusTarget, part: RowBatch, deadline: float
    ) -> None:
        method = requests.method(part)
        answer = await self._send(method, target, requests.rows_request(target, part), deadline)
        done = answer.insert_cnt or answer.upsert_cnt
        if answer.err_index or done not in (0, part.num_rows):
            raise UnknownOutcomeError(
                "SINK_PARTIAL_WRITE",
                f"{method} into {target.database}.{target.collection}: the sink says that it took "
                f"{done} of {part.num_rows} rows",
            )

    async def _send(
        self, method: str, target: requests.MilvusTarget, request: bytes, deadline: float
    ) -> Any:
        # Taken last, so that the time to build the request counts.
        timeout = deadline - time.monotonic()
        if timeout <= 0:
            raise RetryableError(
                "SINK_TIMEOUT",
                f"{method} into {target.database}.{target.collection}: no time left to send it",
            )
        return await self._client.write(method, request, timeout=timeout, database=target.database)
