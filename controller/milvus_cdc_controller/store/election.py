"""Which of several controllers leads: one key in etcd, below the lease of the one that put it.

Laws: a leader counts its lease from the sending of what renewed it, on a clock that counts suspend,
and stops a tenth before its end, so before anybody else can lead; a term that ended never begins
again; who is deposed or stops gives its lease up, so that nobody has to wait for its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import structlog
from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.etcd import (
    Compare,
    CompareTarget,
    EtcdClient,
    EtcdSecurity,
    GetOp,
    KeyRange,
    KeyValue,
    PutOp,
    TxnAnswer,
)

from milvus_cdc_controller import clock
from milvus_cdc_controller.store import LeadershipLost

log = structlog.get_logger(__name__)

CERTAIN_PART = 0.9
"""Of the lease; the rest covers clocks that run at different speed."""
RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Member:
    """One start of a controller process, as the others know it."""

    id: str
    address: str
    """Where the others reach it."""
    version: str
    host: str
    start_time_ms: int

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, value: bytes) -> Member | None:
        """None for what an unknown version has written."""
        try:
            body = json.loads(value)
            return cls(**{name: body[name] for name in cls.__slots__})
        except (ValueError, KeyError, TypeError):
            return None


class Term:
    """A lease, and while its controller leads the leadership below it."""

    def __init__(self, lease: int, lease_seconds: int, asked_ms: int) -> None:
        self.lease = lease
        self.created = 0
        """Revision at which the leader key was put; 0 before that."""
        self._span_ms = round(lease_seconds * 1000 * CERTAIN_PART)
        self._until_ms = asked_ms + self._span_ms
        self._over = asyncio.Event()
        self._why = ""

    @property
    def certain(self) -> bool:
        """Nobody else can be leading now. Once it is not so, it never is again."""
        if not self._over.is_set() and clock.now().mono_ms >= self._until_ms:
            self.end("The leader lease in etcd was not renewed in time")
        return not self._over.is_set()

    @property
    def seconds_left(self) -> float:
        return max(0, self._until_ms - clock.now().mono_ms) / 1000

    def renewed(self, asked_ms: int) -> None:
        self._until_ms = max(self._until_ms, asked_ms + self._span_ms)

    def end(self, why: str) -> None:
        if not self._over.is_set():
            self._why = why
            self._over.set()

    async def over(self) -> None:
        await self._over.wait()

    def lost(self) -> LeadershipLost:
        """What those are told who wait for something of this term."""
        return LeadershipLost(
            f"{self._why or 'The leadership has ended'}; another controller leads now or soon: "
            "try again."
        )


class Election:
    """One controller's part in it: `leader` and `members` as last seen, `win` to lead.

    Begun with `join`, ended with `leave`.
    """

    def __init__(
        self,
        endpoints: list[str],
        prefix: str,
        lease_seconds: int,
        me: Member,
        security: EtcdSecurity | None = None,
    ) -> None:
        # Every wait must end well within the lease, however etcd is silent.
        self._client = EtcdClient(
            endpoints,
            security=security,
            call_seconds=min(5.0, max(0.6, lease_seconds / 3)),
            watch_idle_seconds=max(0.6, lease_seconds / 3),
        )
        self._prefix = prefix.strip("/")
        self._lease_seconds = lease_seconds
        self.me = me
        self.leader: Member | None = None
        self.term = 0
        """Of that leader: grows with each one."""
        self.members: dict[str, Member] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._vacant = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._keeping: dict[Term, asyncio.Task[None]] = {}

    def join(self) -> None:
        """Begins to follow who leads."""
        self._following = asyncio.create_task(self._follow(), name="election")

    async def leave(self) -> None:
        for term in list(self._keeping):
            await self.resign(term)
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self._client.close()

    async def win(self) -> Term:
        """Waits until this controller leads, however long that takes. Raises UserError when etcd
        refuses this client.
        """
        said = ""
        while True:
            term: Term | None = None
            try:
                term = await self._stand()
                if await self._elected(term):
                    return term
            except RetryableError as error:
                if error.message != said:
                    log.warning("etcd does not answer", reason=error.reason, error=error.message)
                said = error.message
            except BaseException:
                if term is not None:
                    await self.resign(term)
                raise
            if term is not None:
                await self.resign(term)
            await asyncio.sleep(RETRY_SECONDS)

    async def resign(self, term: Term) -> None:
        """Ends it here and, if etcd answers, there."""
        term.end("The leadership was given up")
        keeper = self._keeping.pop(term, None)
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        with contextlib.suppress(CdcError):
            await self._client.revoke_lease(term.lease)

    # ---- standing and winning

    async def _stand(self) -> Term:
        asked = clock.now().mono_ms
        lease = (await self._client.grant_lease(self._lease_seconds)).lease
        term = Term(lease, self._lease_seconds, asked)
        self._keeping[term] = asyncio.create_task(self._keep(term), name="leader lease")
        try:
            await self._client.put(self._member_key, self.me.encode(), lease=lease)
        except BaseException:
            await self.resign(term)
            raise
        return term

    async def _elected(self, term: Term) -> bool:
        """False when the lease was lost before."""
        while term.certain:
            self._vacant.clear()
            answer = await self._client.txn(
                [Compare(self._leader_key, CompareTarget.VERSION, 0)],
                [PutOp(self._leader_key, self.me.encode(), term.lease)],
                [GetOp(KeyRange.key(self._leader_key))],
            )
            holder = _found(answer)
            if answer.succeeded:
                term.created = answer.revision
            elif holder is not None and holder.lease == term.lease:
                # Our own put, whose answer was lost.
                term.created = holder.create_revision
            if term.created:
                return term.certain
            if holder is not None and _id(holder) == self.me.id:
                # Of an earlier term of ours, which could not give it up.
                await self._client.revoke_lease(holder.lease)
                continue
            await self._wait_for_vacancy(term)
        return False

    async def _wait_for_vacancy(self, term: Term) -> None:
        """Or for half a lease: a watch may be late."""
        tasks = {asyncio.create_task(self._vacant.wait()), asyncio.create_task(term.over())}
        await asyncio.wait(
            tasks, timeout=self._lease_seconds / 2, return_when=asyncio.FIRST_COMPLETED
        )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, term: Term) -> None:
        while term.certain:
            await asyncio.sleep(min(self._lease_seconds / 5, term.seconds_left + 0.001))
            asked = clock.now().mono_ms
            try:
                async with asyncio.timeout(term.seconds_left):
                    left = await self._client.keep_alive(term.lease)
            except TimeoutError:
                continue
            except CdcError as error:
                # Only etcd knows whether the lease lives on; until it says so time runs out.
                log.warning("controller lease not renewed", error=error.message)
                continue
            if left == 0:
                term.end("The leader lease in etcd has ended")
            term.renewed(asked)

    # ---- knowing who leads

    async def _follow(self) -> None:
        ranges = (KeyRange.key(self._leader_key), KeyRange.prefix(self._members))
        while True:
            try:
                listing = await self._client.list(*ranges)
                self.members.clear()
                leader: tuple[Member | None, int] = (None, 0)
                for kv in listing.kvs:
                    if kv.key == self._leader_key:
                        leader = (Member.decode(kv.value), kv.mod_revision)
                    else:
                        self._note(kv.key, kv.value)
                self._led_by(*leader)
                watch = self._client.watch(*ranges, start_revision=listing.revision + 1)
                try:
                    while True:
                        for event in (await watch.next()).events:
                            if event.key != self._leader_key:
                                self._note(event.key, event.value)
                            elif event.value is None:
                                self._led_by(None, 0)
                            else:
                                self._led_by(Member.decode(event.value), event.mod_revision)
                finally:
                    await watch.close()
            except RetryableError as error:
                # What was known stays: whoever leads may still do so.
                log.debug("the election cannot be watched", error=error.message)
                await asyncio.sleep(RETRY_SECONDS)
            except CdcError as error:
                log.error("the election cannot be watched", error=error.message)
                await asyncio.sleep(self._lease_seconds)

    def _note(self, key: str, value: bytes | None) -> None:
        member = None if value is None else Member.decode(value)
        if member is None:
            self.members.pop(key.removeprefix(self._members), None)
        else:
            self.members[member.id] = member

    def _led_by(self, leader: Member | None, term: int) -> None:
        if leader is None:
            self._vacant.set()
        if (leader, term) == (self.leader, self.term):
            return
        self.leader, self.term = leader, term
        log.info(
            "nobody leads"
            if leader is None
            else "another controller leads"
            if leader.id != self.me.id
            else "this controller was elected",
            address=leader.address if leader is not None else "",
        )
        self.on_change()

    @property
    def _leader_key(self) -> str:
        return leader_key(self._prefix)

    @property
    def _members(self) -> str:
        return f"{self._prefix}/controllers/"

    @property
    def _member_key(self) -> str:
        return self._members + self.me.id


def leader_key(prefix: str) -> str:
    return f"{prefix.strip('/')}/leader"


def _found(answer: TxnAnswer) -> KeyValue | None:
    return answer.results[0][0] if answer.results and answer.results[0] else None


def _id(holder: KeyValue) -> str:
    member = Member.decode(holder.value)
    return member.id if member is not None else ""
