"""The shared store: keys below a prefix of an etcd, held by whoever holds the leader key.

Laws: every commit is a transaction that compares the leader key's creation with ours, so a
controller that lost its lease can write nothing; a lost lease ends the process. A commit larger
than etcd's limit is cut into several transactions, in the order given.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Mapping
from itertools import islice

import structlog
from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.etcd import (
    Compare,
    CompareTarget,
    DeleteOp,
    EtcdClient,
    GetOp,
    KeyRange,
    PutOp,
)

from milvus_cdc_controller.store import LeadershipLost

log = structlog.get_logger(__name__)


class EtcdStore:
    """Opened with `open`, which takes the leadership and keeps it alive in the background."""

    writes_max = 100
    """etcd's default allows 128 operations a transaction (--max-txn-ops)."""

    def __init__(self, client: EtcdClient, prefix: str, lease_seconds: int) -> None:
        self._client = client
        self._prefix = prefix.strip("/")
        self._lease_seconds = lease_seconds
        self._lease = 0
        self._created = 0
        self._renewed = 0.0
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self.incarnation = 0

    @classmethod
    async def open(
        cls, endpoints: list[str], prefix: str, lease_seconds: int, *, wait_seconds: float
    ) -> EtcdStore:
        """Waits so long for another's lease to end, since a killed controller leaves one behind.

        Raises UserError STORE_IN_USE, RetryableError when etcd does not answer.
        """
        store = cls(EtcdClient(endpoints), prefix, lease_seconds)
        try:
            await store._lead(wait_seconds)
        except BaseException:
            await store.close()
            raise
        return store

    async def _lead(self, wait_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_seconds
        said = False
        self._renewed = loop.time()
        self._lease = (await self._client.grant_lease(self._lease_seconds)).lease
        self._keeper = asyncio.create_task(self._keep(), name="leader lease")
        me = json.dumps({"host": socket.gethostname(), "lease": f"{self._lease:x}"}).encode()
        while True:
            answer = await self._client.txn(
                [Compare(self._leader, CompareTarget.VERSION, 0)],
                [PutOp(self._leader, me, self._lease)],
                [GetOp(KeyRange.key(self._leader))],
            )
            if answer.succeeded:
                self._created = answer.revision
                break
            holder = answer.results[0][0] if answer.results and answer.results[0] else None
            if holder is not None and holder.lease == self._lease:
                # Our own put, whose answer was lost.
                self._created = holder.create_revision
                break
            who = holder.value.decode(errors="replace") if holder is not None else "unknown"
            if loop.time() >= until:
                raise UserError(
                    "STORE_IN_USE",
                    f"another controller holds leadership below {self._prefix!r} ({who}); stop it, "
                    "or give this one its own prefix.",
                    field="store.etcd.prefix",
                )
            if not said:
                log.warning("another controller holds leadership, waiting", holder=who)
                said = True
            await asyncio.sleep(0.5)
        await self._count()

    async def _count(self) -> None:
        """The next incarnation, under our leadership."""
        key = f"{self._prefix}/incarnation"
        listing = await self._client.get(key)
        before = int(listing.kvs[0].value) if listing.kvs else 0
        self.incarnation = before + 1
        await self._txn([PutOp(key, str(self.incarnation).encode())])

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 5)
            asked = asyncio.get_running_loop().time()
            try:
                left = await self._client.keep_alive(self._lease)
            except CdcError as error:
                # Only etcd knows whether the lease lives on; until it says so we are not certain.
                log.warning("leader lease not renewed", error=error.message)
                continue
            if left == 0:
                self._lost.set()
                return
            self._renewed = asked

    @property
    def certain(self) -> bool:
        return asyncio.get_running_loop().time() < self._renewed + self._lease_seconds

    async def lost(self) -> LeadershipLost:
        await self._lost.wait()
        return _lost()

    async def load(self) -> dict[str, bytes]:
        try:
            listing = await self._client.list(KeyRange.prefix(self._records))
        except RetryableError as error:
            raise RetryableError("STORE_UNAVAILABLE", f"etcd: {error.message}") from error
        start = len(self._records)
        return {kv.key[start:]: kv.value for kv in listing.kvs}

    async def commit(self, writes: Mapping[str, bytes | None]) -> None:
        items = iter(writes.items())
        while part := list(islice(items, self.writes_max)):
            await self._txn(
                [
                    DeleteOp(KeyRange.key(self._records + key))
                    if value is None
                    else PutOp(self._records + key, value)
                    for key, value in part
                ]
            )

    async def _txn(self, operations: list[PutOp | DeleteOp]) -> None:
        try:
            answer = await self._client.txn(
                [Compare(self._leader, CompareTarget.CREATE_REVISION, self._created)], operations
            )
        except RetryableError as error:
            raise RetryableError("STORE_UNAVAILABLE", f"etcd: {error.message}") from error
        if not answer.succeeded:
            self._lost.set()
            raise _lost()

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._lease:
            with contextlib.suppress(CdcError):
                await self._client.revoke_lease(self._lease)
        await self._client.close()

    @property
    def _leader(self) -> str:
        return f"{self._prefix}/leader"

    @property
    def _records(self) -> str:
        return f"{self._prefix}/records/"


def _lost() -> LeadershipLost:
    return LeadershipLost(
        "The leader lease in etcd has ended (it was not renewed in time), so another controller "
        "may lead by now; this one ends."
    )
