"""The shared store: keys below a prefix of an etcd, written by whoever leads.

Laws: every transaction compares the leader key's creation with that of our term and the number of
the last one with ours, so a deposed leader changes nothing, and a request that was given up and
gets through later changes nothing either. A commit too large for one transaction is first stored
beside the records, whole, then carried out; the next leader ends what a dead one had begun so, and
forgets what was never whole.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping

from milvus_cdc.errors import RetryableError
from milvus_cdc.etcd import (
    Compare,
    CompareTarget,
    CompareValue,
    DeleteOp,
    EtcdClient,
    EtcdSecurity,
    GetOp,
    KeyRange,
    KeyValue,
    PutOp,
)

from milvus_cdc_controller.store import LeadershipLost
from milvus_cdc_controller.store.election import Election, Term, leader_key

WRITES_MAX = 100
"""etcd's default allows 128 operations a transaction (--max-txn-ops)."""
BYTES_MAX = 1_000_000
"""And requests of 1.5 MiB (--max-request-bytes); a stored part is a third larger than what is in
it.
"""
_TRIES = 5

Write = tuple[str, bytes | None]


class EtcdStore:
    """The store during one term. Opened with `open`, closed with the term."""

    def __init__(
        self, election: Election, term: Term, client: EtcdClient, prefix: str, promised_ms: int
    ) -> None:
        self._election = election
        self._term = term
        self._client = client
        self._prefix = prefix.strip("/")
        self._number = 0
        """Of the last transaction of this term that is known to be done."""
        self._unfinished = 0
        """Parts of a large commit that is stored whole and not yet carried out."""
        self._unsure = False
        """Whether there is such a one."""
        self._promised_ms = promised_ms
        self.incarnation = 0
        self.inherited_ms = 0
        """The longest lease that leaders before may have given to replicators."""

    @classmethod
    async def open(
        cls,
        election: Election,
        term: Term,
        endpoints: list[str],
        prefix: str,
        promised_ms: int,
        security: EtcdSecurity | None = None,
    ) -> EtcdStore:
        """`promised_ms`: how long a lease this leader gives to replicators.

        Raises RetryableError STORE_UNAVAILABLE, LeadershipLost; the term is then resigned.
        """
        store = cls(election, term, EtcdClient(endpoints, security=security), prefix, promised_ms)
        try:
            await store._begin()
        except BaseException:
            await store.close()
            raise
        return store

    async def _begin(self) -> None:
        """The next incarnation, and what the leader before may have left half done."""
        counter = f"{self._prefix}/incarnation"
        before = await self._get(counter)
        self.incarnation = (int(before.value) if before is not None else 0) + 1
        promised = await self._get(self._promise)
        self.inherited_ms = int(promised.value) if promised is not None else 0
        longest = max(self.inherited_ms, self._promised_ms)
        operations: list[PutOp | DeleteOp] = [
            PutOp(counter, str(self.incarnation).encode()),
            PutOp(self._promise, str(longest).encode()),
            PutOp(self._numbers, b"0"),
        ]
        await self._try_txn(operations, [])
        self._unsure = True
        await self._finish()
        await self._txn([DeleteOp(KeyRange.prefix(self._parts))])

    async def forget_inherited(self) -> None:
        """When leases of leaders before have ended. Raises as `commit`."""
        await self._txn([PutOp(self._promise, str(self._promised_ms).encode())])

    @property
    def certain(self) -> bool:
        return self._term.certain

    async def lost(self) -> LeadershipLost:
        await self._term.over()
        return self._term.lost()

    async def load(self) -> dict[str, bytes]:
        start = len(self._records)
        return {kv.key[start:]: kv.value for kv in await self._list(self._records)}

    async def commit(self, writes: Mapping[str, bytes | None]) -> None:
        await self._finish()
        groups = list(_groups(writes.items()))
        if len(groups) == 1:
            await self._txn(self._operations(groups[0]))
            return
        for number, group in enumerate(groups):
            await self._txn([PutOp(self._part(number), _pack(group))])
        if groups:
            self._unsure = True
            await self._txn([PutOp(self._whole, str(len(groups)).encode())])
            await self._finish()

    async def _finish(self) -> None:
        """Carries out the large commit that is stored whole, if there is one."""
        if self._unsure:
            # After this one nothing that was sent before it can still be done.
            await self._txn([])
            whole = await self._get(self._whole)
            self._unfinished = int(whole.value) if whole is not None else 0
            self._unsure = False
        if not self._unfinished:
            return
        for kv in await self._list(self._parts):
            if kv.key < self._part(self._unfinished):
                await self._txn([*self._operations(_unpack(kv.value)), _delete(kv.key)])
        await self._txn([_delete(self._whole)])
        self._unfinished = 0

    def _operations(self, writes: Iterable[Write]) -> list[PutOp | DeleteOp]:
        return [
            _delete(self._records + key) if value is None else PutOp(self._records + key, value)
            for key, value in writes
        ]

    async def _txn(self, operations: list[PutOp | DeleteOp]) -> None:
        """Raises RetryableError, after which it may have been done or not, and LeadershipLost."""
        for _ in range(_TRIES):
            following = self._number + 1
            found = await self._try_txn(
                [*operations, PutOp(self._numbers, str(following).encode())],
                [CompareValue(self._numbers, str(self._number).encode())],
            )
            if found is None:
                self._number = following
                return
            # An earlier one whose answer was lost has been done: this one comes after it.
            self._number = found
        raise RetryableError("STORE_UNAVAILABLE", "etcd: somebody else writes to the same prefix")

    async def _try_txn(
        self, operations: list[PutOp | DeleteOp], conditions: list[CompareValue]
    ) -> int | None:
        """None when it was done, else the number found."""
        leader = leader_key(self._prefix)
        try:
            answer = await self._client.txn(
                [Compare(leader, CompareTarget.CREATE_REVISION, self._term.created), *conditions],
                operations,
                [GetOp(KeyRange.key(leader)), GetOp(KeyRange.key(self._numbers))],
            )
        except RetryableError as error:
            if not self._term.certain:
                raise self._term.lost() from error
            raise RetryableError("STORE_UNAVAILABLE", f"etcd: {error.message}") from error
        if answer.succeeded:
            return None
        holder, number = answer.results
        if not number or not holder or holder[0].create_revision != self._term.created:
            self._term.end("Another controller has been elected")
            raise self._term.lost()
        return int(number[0].value)

    async def _get(self, key: str) -> KeyValue | None:
        return next(iter(await self._list(key, whole_range=False)), None)

    async def _list(self, key: str, *, whole_range: bool = True) -> tuple[KeyValue, ...]:
        keys = KeyRange.prefix(key) if whole_range else KeyRange.key(key)
        try:
            return (await self._client.list(keys)).kvs
        except RetryableError as error:
            raise RetryableError("STORE_UNAVAILABLE", f"etcd: {error.message}") from error

    async def close(self) -> None:
        await self._election.resign(self._term)
        await self._client.close()

    @property
    def _records(self) -> str:
        return f"{self._prefix}/records/"

    @property
    def _numbers(self) -> str:
        return f"{self._prefix}/commit-number"

    @property
    def _promise(self) -> str:
        return f"{self._prefix}/replicator-lease-ms"

    @property
    def _whole(self) -> str:
        return f"{self._prefix}/large-commit"

    @property
    def _parts(self) -> str:
        return f"{self._prefix}/large-commit-parts/"

    def _part(self, number: int) -> str:
        return f"{self._parts}{number:08d}"


def _delete(key: str) -> DeleteOp:
    return DeleteOp(KeyRange.key(key))


def _groups(writes: Iterable[Write]) -> Iterator[list[Write]]:
    """In order, each fit for one transaction."""
    group: list[Write] = []
    held = 0
    for key, value in writes:
        size = len(key) + len(value or b"") + 64
        if group and (len(group) == WRITES_MAX or held + size > BYTES_MAX):
            yield group
            group, held = [], 0
        group.append((key, value))
        held += size
    if group:
        yield group


def _pack(writes: list[Write]) -> bytes:
    return json.dumps(
        [[k, None if v is None else base64.b64encode(v).decode()] for k, v in writes]
    ).encode()


def _unpack(value: bytes) -> list[Write]:
    return [(k, None if v is None else base64.b64decode(v)) for k, v in json.loads(value)]
