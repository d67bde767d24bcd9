"""Controllers that stand for election on a real etcd, without the rest of a controller."""

from __future__ import annotations

import uuid

from milvus_cdc_controller.store.election import Election, Member, Term
from milvus_cdc_controller.store.etcd import EtcdStore

from tests.servers import EtcdServer

LEASE_SECONDS = 2


class Candidate:
    """One controller's part in the election."""

    def __init__(self, server: EtcdServer, prefix: str, name: str = "") -> None:
        self.endpoints = [server.endpoint.removeprefix("http://")]
        self.prefix = prefix
        self.lease_ms = 15_000
        self.me = Member(name or str(uuid.uuid4()), f"{name or 'here'}:1", "1", "host", 0)
        self.election = Election(self.endpoints, prefix, LEASE_SECONDS, self.me)
        self.election.join()
        self.term: Term | None = None

    async def win(self) -> EtcdStore:
        """Waits for it."""
        self.term = await self.election.win()
        return await EtcdStore.open(
            self.election, self.term, self.endpoints, self.prefix, self.lease_ms
        )

    async def freeze(self) -> None:
        """Its lease is not renewed any more, as if its process were stopped."""
        assert self.term is not None
        self.election._keeping.pop(self.term).cancel()

    @classmethod
    async def lead(cls, server: EtcdServer, prefix: str) -> EtcdStore:
        """The store of a controller of its own, which leaves when it is closed."""
        candidate = cls(server, prefix)
        store = await candidate.win()
        close = store.close

        async def leave() -> None:
            await close()
            await candidate.election.leave()

        store.close = leave  # type: ignore[method-assign]
        return store
