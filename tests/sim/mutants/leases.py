"""Of leases and leadership."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

from milvus_cdc.errors import RetryableError
from milvus_cdc_controller.core import events, liveness, sessions
from milvus_cdc_controller.core.granting import let_go
from milvus_cdc_controller.store import election
from milvus_cdc_controller.store import etcd as etcd_store
from milvus_cdc_replicator import gate, session
from milvus_cdc_replicator.core import lease

from tests.sim.clockwork import Loop
from tests.sim.mutants import handle, mutant, put

# The lease.


@mutant("the controller waits for the lease without the clock margin")
def lease_margin_dropped(stack: ExitStack) -> None:
    put(stack, liveness.Leases, "end_ms", lambda self, ms: ms + self.ttl_ms)


@mutant("the lease runs from every heartbeat, answered or not")
def lease_without_acknowledgement(stack: ExitStack) -> None:
    def sent(self: Any, seq: int, now: float) -> None:
        self._expires_at = max(self._expires_at, now + self._ttl)

    put(stack, lease.Lease, "heartbeat_sent", sent)


@mutant("the lease runs from the acknowledgement")
def lease_from_the_acknowledgement(stack: ExitStack) -> None:
    def acked(self: Any, seq: int) -> None:
        if self._sent.pop(seq, None) is not None:
            self._expires_at = max(self._expires_at, gate.boottime() + self._ttl)

    put(stack, lease.Lease, "heartbeat_acked", acked)


@mutant("a write's deadline may lie behind the lease's end")
def deadline_behind_the_lease(stack: ExitStack) -> None:
    put(
        stack,
        lease.Lease,
        "write_timeout",
        lambda self, now, wanted, least: wanted if self.remaining(now) >= least else None,
    )


@mutant("a write may start without a lease")
def write_without_lease(stack: ExitStack) -> None:
    put(stack, lease.Lease, "write_timeout", lambda self, now, wanted, least: wanted)


@mutant("the lease's clock stands still while the process is frozen")
def clock_stops_with_the_process(stack: ExitStack) -> None:
    def running_time() -> float:
        at = asyncio.get_running_loop()
        assert isinstance(at, Loop)
        return at.time() - at.slept

    for module in (gate, session):
        put(stack, module, "boottime", running_time)


@mutant("the replicator takes its lease for a third longer than it is")
def lease_taken_for_longer(stack: ExitStack) -> None:
    configure = lease.Lease.configure
    put(stack, lease.Lease, "configure", lambda self, ttl: configure(self, ttl * 4 / 3))


@mutant("a silent replicator loses its work as soon as it is suspect")
def suspect_is_lost(stack: ExitStack) -> None:
    put(
        stack,
        liveness.Session,
        "expired",
        lambda self, mono_ms: mono_ms - self.heard_ms > 7_000 and mono_ms >= self.heard_ms,
    )


@mutant("a leader that etcd does not answer goes on renewing leases")
def never_uncertain(stack: ExitStack) -> None:
    put(stack, election.Term, "certain", property(lambda self: not self._over.is_set()))


@mutant("a lost stream frees its replicator's work at once")
def lost_stream_is_a_lost_owner(stack: ExitStack) -> None:
    handler = sessions.stream_lost

    def lost(world: Any, event: Any) -> None:
        found = world.session_of(event.stream)
        handler(world, event)
        if found is not None:
            for grant in [g for g in world.grants.values() if g.instance == found.instance]:
                let_go(world, grant)

    handle(stack, events.StreamLost, lost)


@mutant("a restarted controller counts stored grants as over")
def restart_forgets_leases(stack: ExitStack) -> None:
    started = sessions.started

    def forgetful(world: Any) -> None:
        started(world)
        for known in world.sessions.values():
            known.lease_end_ms = world.now.mono_ms

    put(stack, sessions, "started", forgetful)


@mutant("commits do not compare the leader's key")
def leader_not_compared(stack: ExitStack) -> None:
    async def try_txn(self: Any, operations: Any, _conditions: Any) -> None:
        try:
            await self._client.txn([], operations)
        except RetryableError as error:
            raise RetryableError("STORE_UNAVAILABLE", error.message) from error

    put(stack, etcd_store.EtcdStore, "_try_txn", try_txn)


@mutant("a commit that was given up may be carried out behind later ones")
def commits_not_numbered(stack: ExitStack) -> None:
    try_txn = etcd_store.EtcdStore._try_txn
    put(
        stack,
        etcd_store.EtcdStore,
        "_try_txn",
        lambda self, operations, conditions: try_txn(self, operations, []),
    )
