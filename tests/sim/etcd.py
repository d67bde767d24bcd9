"""An etcd in a few lines: revisions, transactions, leases, watches, compaction.

Law: what a client is told is what etcd's API promises and nothing more: reads are linearizable, a
transaction is all or nothing, a watch brings every event once and in order or says why not, a lease
that is not renewed in time ends with its keys.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from milvus_cdc.errors import RetryableError, UnknownOutcomeError
from milvus_cdc.etcd import (
    Answer,
    Compacted,
    Compare,
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
    WatchBatch,
    WatchEvent,
)
from milvus_cdc.etcd.records import CompareOp, decode_key, encode_key

from tests.sim.clockwork import Clockwork, Loop
from tests.sim.network import Network, Server, remote

T = TypeVar("T")
Operation = PutOp | DeleteOp | GetOp
CALL_SECONDS = 5.0
WATCH_SILENT_SECONDS = 15.0


@dataclass(slots=True)
class _Lease:
    ttl: float
    ends: float
    keys: set[bytes] = field(default_factory=set)


class Etcd(Server):
    """One cluster."""

    def __init__(self, name: str, clockwork: Clockwork, cluster_id: int) -> None:
        super().__init__(name)
        self.clockwork = clockwork
        self.cluster_id = cluster_id
        self.revision = 1
        self.compacted = 0
        """Events at or before it are forgotten."""
        self.keys: dict[bytes, KeyValue] = {}
        self._history: list[WatchEvent] = []
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self.watches: list[Watch] = []
        self.on_commit: Callable[[Sequence[Operation]], None] = lambda operations: None
        """Hears of every transaction that changed something."""

    # ---- what clients ask for, done at once

    def list(self, *ranges: KeyRange) -> Listing:
        found: list[KeyValue] = []
        for wanted in ranges:
            if not wanted.end:
                kv = self.keys.get(wanted.start)
                found.extend([kv] if kv is not None else [])
            else:
                found.extend(self.keys[k] for k in sorted(self.keys) if _within(k, wanted))
        return Listing(self.cluster_id, self.revision, tuple(found))

    def txn(
        self,
        compare: Sequence[Compare | CompareValue],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
    ) -> TxnAnswer:
        self.expire()
        held = all(map(self._holds, compare))
        operations = then if held else otherwise
        writes = [op for op in operations if not isinstance(op, GetOp)]
        if writes:
            self.revision += 1
        results = tuple(self._do(op) for op in operations)
        if writes:
            self.on_commit(writes)
            self._tell()
        return TxnAnswer(self.cluster_id, self.revision, held, results)

    def grant(self, ttl: float) -> int:
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(ttl, self.clockwork.now + ttl)
        self.clockwork.after(ttl + 0.01, self._look_at, self._last_lease)
        return self._last_lease

    def keep_alive(self, lease: int) -> int:
        self.expire()
        held = self._leases.get(lease)
        if held is None:
            return 0
        held.ends = self.clockwork.now + held.ttl
        return int(held.ttl)

    def revoke(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is not None and held.keys:
            self.txn((), [DeleteOp(KeyRange(key)) for key in sorted(held.keys)])

    def expire(self) -> None:
        for lease in [n for n, held in self._leases.items() if held.ends <= self.clockwork.now]:
            self.revoke(lease)

    def compact(self) -> None:
        """Everything before now is forgotten."""
        self.compacted = self.revision
        self._history.clear()

    def since(self, revision: int) -> Sequence[WatchEvent]:
        """Events from there on. Raises Compacted."""
        if revision <= self.compacted:
            raise Compacted(self.compacted + 1)
        return self._history[bisect_left(self._history, revision, key=_revision) :]

    # ---- inside

    def _holds(self, condition: Compare | CompareValue) -> bool:
        kv = self.keys.get(encode_key(condition.key))
        if isinstance(condition, CompareValue):
            return kv is not None and _ordered(kv.value, condition.op, condition.value)
        number = 0
        if kv is not None:
            match condition.target:
                case CompareTarget.MOD_REVISION:
                    number = kv.mod_revision
                case CompareTarget.CREATE_REVISION:
                    number = kv.create_revision
                case CompareTarget.VERSION:
                    number = kv.version
                case CompareTarget.LEASE:
                    number = kv.lease
        return _ordered(number, condition.op, condition.number)

    def _do(self, operation: Operation) -> tuple[KeyValue, ...]:
        match operation:
            case GetOp(range=wanted):
                return self.list(wanted).kvs
            case PutOp(key=key, value=value, lease=lease):
                if lease and lease not in self._leases:
                    # Before anything of it is done: what has no lease would never end.
                    raise RetryableError("ETCD_UNAVAILABLE", "requested lease not found")
                name = encode_key(key)
                before = self.keys.get(name)
                created = before.create_revision if before else self.revision
                version = before.version + 1 if before else 1
                self.keys[name] = KeyValue(key, value, created, self.revision, version, lease)
                if lease:
                    self._leases[lease].keys.add(name)
                self._history.append(WatchEvent(key, value, self.revision))
            case DeleteOp(range=wanted):
                gone = [k for k in sorted(self.keys) if _within(k, wanted)]
                for name in gone:
                    del self.keys[name]
                    self._history.append(WatchEvent(decode_key(name), None, self.revision))
        return ()

    def _tell(self) -> None:
        changed = [encode_key(event.key) for event in self.since(self.revision)]
        for watch in self.watches:
            if any(map(watch.minds, changed)):
                watch.hear(self.revision)

    def _look_at(self, lease: int) -> None:
        """When it should have ended, unless it was renewed meanwhile."""
        held = self._leases.get(lease)
        if held is not None and held.ends > self.clockwork.now:
            self.clockwork.at(held.ends + 0.01, self._look_at, lease)
        else:
            self.expire()


def _revision(event: WatchEvent) -> int:
    return event.mod_revision


def _within(key: bytes, wanted: KeyRange) -> bool:
    if not wanted.end:
        return key == wanted.start
    return key >= wanted.start and (key < wanted.end or wanted.end == b"\0")


def _ordered(found: int | bytes, op: CompareOp, wanted: int | bytes) -> bool:
    match op:
        case CompareOp.EQUAL:
            return found == wanted
        case CompareOp.NOT_EQUAL:
            return found != wanted
        case CompareOp.LESS:
            return found < wanted  # type: ignore[operator]
        case _:
            return found > wanted  # type: ignore[operator]


class Watch:
    """As milvus_cdc.etcd.Watch: stands where it stood after every error but Compacted."""

    def __init__(self, client: Client, ranges: Sequence[KeyRange], start_revision: int) -> None:
        self._client = client
        self._ranges = ranges
        self._next = start_revision
        self._visible = 0
        """Newest revision whose events have come through."""
        self._waiting: asyncio.Future[None] | None = None
        self._connected = False

    def hear(self, revision: int) -> None:
        """Something has changed: it is known here a little later."""
        network = self._client.network
        delay = network.delay(self._client.etcd.name, self._client.host)
        network.clockwork.after(delay, self._come, revision)

    def _come(self, revision: int) -> None:
        client = self._client
        if not client.network.open(client.etcd.name, client.host) or client.etcd.down:
            return  # its connection ends some time; then it asks from where it stands
        self._visible = max(self._visible, revision)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def next(self) -> WatchBatch:
        client = self._client
        etcd = client.etcd
        if not self._connected:
            self._visible = max(self._visible, await client.call(lambda: etcd.revision))
            self._connected = True
            if self not in etcd.watches:
                etcd.watches.append(self)
        while True:
            if self._next <= self._visible:
                events = [e for e in etcd.since(self._next) if e.mod_revision <= self._visible]
                self._next = self._visible + 1
                mine = tuple(e for e in events if self.minds(encode_key(e.key)))
                if mine:
                    return WatchBatch(etcd.cluster_id, mine[-1].mod_revision, mine)
                continue
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(WATCH_SILENT_SECONDS):
                    await self._waiting
            except TimeoutError:
                # Still there? If not, this raises and the next call connects anew.
                self._connected = False
                self._visible = max(self._visible, await client.call(lambda: etcd.revision))
                self._connected = True

    def minds(self, key: bytes) -> bool:
        return any(_within(key, wanted) for wanted in self._ranges)

    async def close(self) -> None:
        if self in self._client.etcd.watches:
            self._client.etcd.watches.remove(self)


class Client:
    """As milvus_cdc.etcd.EtcdClient, for one process."""

    def __init__(
        self,
        network: Network,
        host: str,
        etcd: Etcd,
        call_seconds: float = CALL_SECONDS,
        *,
        stray: bool = False,
    ) -> None:
        """`stray`: what was sent on a connection that broke may still be carried out later."""
        self.network = network
        self.host = host
        self.etcd = etcd
        self._seconds = call_seconds
        self._stray = stray

    async def call(self, act: Callable[[], T], *, write: bool = False) -> T:
        stray = self._stray and write
        try:
            return await remote(self.network, self.host, self.etcd, act, self._seconds, stray=stray)
        except ConnectionRefusedError:
            raise RetryableError("ETCD_UNAVAILABLE", "nobody listens there") from None
        except (TimeoutError, ConnectionResetError):
            lost = UnknownOutcomeError if write else RetryableError
            raise lost("ETCD_UNAVAILABLE", "the connection broke") from None

    async def get(self, key: str) -> Listing:
        return await self.list(KeyRange.key(key))

    async def list(self, *ranges: KeyRange, revision: int = 0) -> Listing:
        assert not revision, "not modelled"
        return await self.call(lambda: self.etcd.list(*ranges))

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> Answer:
        return await self.txn((), [PutOp(key, value, lease)])

    async def delete(self, keys: KeyRange) -> Deleted:
        before = len(self.etcd.keys)
        answer = await self.txn((), [DeleteOp(keys)])
        return Deleted(answer.cluster_id, answer.revision, before - len(self.etcd.keys))

    async def txn(
        self,
        compare: Sequence[Compare | CompareValue],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
    ) -> TxnAnswer:
        return await self.call(lambda: self.etcd.txn(compare, then, otherwise), write=True)

    async def grant_lease(self, ttl_seconds: int) -> LeaseGrant:
        lease = await self.call(lambda: self.etcd.grant(ttl_seconds))
        return LeaseGrant(self.etcd.cluster_id, self.etcd.revision, lease, ttl_seconds)

    async def keep_alive(self, lease: int) -> int:
        return await self.call(lambda: self.etcd.keep_alive(lease))

    async def revoke_lease(self, lease: int) -> None:
        await self.call(lambda: self.etcd.revoke(lease))

    def watch(self, *ranges: KeyRange, start_revision: int) -> Watch:
        return Watch(self, ranges, start_revision)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
