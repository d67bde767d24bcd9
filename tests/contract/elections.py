"""Controllers that stand for election on a real etcd, without the rest of a controller."""

from __future__ import annotations

import uuid

from milvus_cdc.etcd import EtcdSecurity
from milvus_cdc.tls import TlsFiles
from milvus_cdc_controller.store.election import Election, Member, Term
from milvus_cdc_controller.store.etcd import EtcdStore

from tests.servers import EtcdServer

LEASE_SECONDS = 2


def security_of(server: EtcdServer, user: str = "cdc") -> EtcdSecurity | None:
    """What the server wants to see; None for one that wants nothing."""
    if server.authority is None:
        return None
    pair = server.authority.issue(f"client-{uuid.uuid4().hex[:8]}")
    files = TlsFiles(str(server.authority.ca_file), str(pair.certificate), str(pair.key))
    if user not in server.users:
        return EtcdSecurity(files)
    return EtcdSecurity(files, user, lambda: server.users[user])


class Candidate:
    """One controller's part in the election."""

    def __init__(
        self,
        server: EtcdServer,
        prefix: str,
        name: str = "",
        security: EtcdSecurity | None = None,
    ) -> None:
        self.endpoints = [server.endpoint.removeprefix("http://")]
        self.prefix = prefix
        self.security = security or security_of(server)
        self.lease_ms = 15_000
        self.me = Member(name or str(uuid.uuid4()), f"{name or 'here'}:1", "1", "host", 0)
        self.election = Election(self.endpoints, prefix, LEASE_SECONDS, self.me, self.security)
        self.election.join()
        self.term: Term | None = None

    async def win(self) -> EtcdStore:
        """Waits for it."""
        self.term = await self.election.win()
        return await EtcdStore.open(
            self.election, self.term, self.endpoints, self.prefix, self.lease_ms, self.security
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
