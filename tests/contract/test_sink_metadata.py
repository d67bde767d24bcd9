"""What every sink promises of aliases, roles and credentials: the memory sink and a real Milvus."""

from __future__ import annotations

import base64
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.model import RoleGrant
from milvus_cdc.sink import Sink
from milvus_cdc.sink.differences import Action
from milvus_cdc.sink.memory import MemorySink
from milvus_cdc.sink.metadata import (
    AliasWish,
    CredentialAction,
    CredentialChange,
    MetadataWish,
    RbacWish,
)
from milvus_cdc.sink.milvus import MilvusSink

from tests.contract.sink_samples import PLAIN, Sample
from tests.servers import Stack


@dataclass
class Bench:
    sink: Sink
    mark: str

    @property
    def database(self) -> str:
        return f"meta_{self.mark}"

    async def collection(self, name: str) -> Sample:
        sample = Sample(self.database, name, PLAIN)
        await self.sink.open_collection(
            sample.want(), opened=False, adopt=False, recreate=False, sink_collection_id=0
        )
        return sample

    async def apply(self, wish: MetadataWish) -> list[tuple[str, str, str]]:
        """What was mended, (action, kind, name); afterwards nothing differs."""
        diff = await self.sink.look_at_metadata(wish)
        assert diff.troubles == []
        done = []
        for repair in diff.repairs:
            if repair.mend is not None:
                await repair.mend()
                await repair.mend()  # idempotent
                difference = repair.difference
                done.append((difference.action.value, difference.kind, difference.name))
        again = await self.sink.look_at_metadata(wish)
        assert [each.difference for each in again.repairs if each.mend is not None] == []
        return done

    def alias(self, name: str, collection: str) -> MetadataWish:
        return MetadataWish(aliases=(AliasWish(self.database, name, collection),))


@pytest.fixture(params=["memory", "milvus"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    mark = uuid.uuid4().hex[:8]
    if request.param == "memory":
        yield Bench(MemorySink(), mark)
        return
    stack: Stack = request.getfixturevalue("nats_stack")
    sink = MilvusSink(stack.sink.uri)
    yield Bench(sink, mark)
    await sink.close()


async def test_an_alias_is_made_moved_and_dropped(bench: Bench) -> None:
    await bench.sink.ensure_database(bench.database)
    for name in ("blue", "green"):
        await bench.collection(name)
    assert await bench.apply(bench.alias("live", "blue")) == [("CREATE", "alias", "live")]
    assert await bench.apply(bench.alias("live", "blue")) == []
    assert await bench.apply(bench.alias("live", "green")) == [("ALTER", "alias", "live")]
    gone = MetadataWish(dropped_aliases=((bench.database, "live"), (bench.database, "never")))
    assert await bench.apply(gone) == [("DROP", "alias", "live")]
    assert await bench.apply(gone) == []


async def test_an_alias_whose_collection_is_gone_moves_to_another(bench: Bench) -> None:
    await bench.sink.ensure_database(bench.database)
    old, _ = await bench.collection("old"), await bench.collection("new")
    await bench.apply(bench.alias("live", "old"))
    await bench.sink.drop_collection(old.want(), sink_collection_id=0)
    assert [kind for _, kind, _ in await bench.apply(bench.alias("live", "new"))] == ["alias"]


async def test_an_alias_stays_with_a_collection_that_is_made_anew(bench: Bench) -> None:
    await bench.sink.ensure_database(bench.database)
    sample = await bench.collection("blue")
    await bench.apply(bench.alias("live", "blue"))
    await bench.sink.open_collection(
        sample.want(), opened=False, adopt=False, recreate=True, sink_collection_id=0
    )
    assert await bench.apply(bench.alias("live", "blue")) == []


async def test_an_alias_cannot_take_the_name_of_a_collection(bench: Bench) -> None:
    await bench.sink.ensure_database(bench.database)
    for name in ("blue", "green"):
        await bench.collection(name)
    (repair,) = (await bench.sink.look_at_metadata(bench.alias("blue", "green"))).repairs
    assert repair.mend is not None
    with pytest.raises(UserError) as failed:
        await repair.mend()
    assert failed.value.reason == "SINK_ALIAS_NAME_TAKEN"


async def test_a_database_comes_before_what_is_in_it_and_goes_after(bench: Bench) -> None:
    there = MetadataWish(databases=((bench.database, False),))
    assert await bench.apply(there) == [("CREATE", "database", bench.database)]
    sample = await bench.collection("blue")
    await bench.apply(bench.alias("live", "blue"))
    await bench.apply(MetadataWish(dropped_aliases=((bench.database, "live"),)))
    await bench.sink.drop_collection(sample.want(), sink_collection_id=0)
    gone = MetadataWish(databases=((bench.database, True),))
    assert await bench.apply(gone) == [("DROP", "database", bench.database)]
    assert await bench.sink.diff_metadata(gone) == ()
    (missing,) = await bench.sink.diff_metadata(there)
    assert (missing.action, missing.kind) == (Action.CREATE, "database")


async def test_roles_are_added_to_what_is_there(bench: Bench) -> None:
    role, user = f"role_{bench.mark}", f"user_{bench.mark}"
    grants = (
        RoleGrant(role, "Collection", "blue", bench.database, "Insert"),
        RoleGrant(role, "Collection", "*", "*", "Search"),
        RoleGrant(role, "Global", "*", "default", "CreateCollection"),
        RoleGrant(role, "User", "*", "default", "SelectUser"),
    )
    rbac = RbacWish(
        users=("root", user), roles=("admin", role), members=((user, role),), grants=grants
    )
    wish = MetadataWish(rbac=rbac)
    done = await bench.apply(wish)
    assert done == [("CREATE", "role", role), *[("CREATE", "grant", role)] * 4]
    waiting = await bench.sink.look_at_metadata(wish)
    assert [each.difference.name for each in waiting.repairs] == [user]
    assert [kind for kind, _ in waiting.conditions] == ["CREDENTIAL_NEEDED"]
    assert user in waiting.conditions[0][1]

    password = base64.b64encode(b"secret12").decode()
    made = CredentialChange(CredentialAction.CREATE, user, password)
    for _ in range(2):
        await bench.sink.change_credential(made)
    assert await bench.apply(wish) == [("CREATE", "member", role)]
    assert (await bench.sink.look_at_metadata(wish)).conditions == []

    gone = RbacWish(dropped_roles=(role,), dropped_members=((user, role),), dropped_grants=grants)
    done = await bench.apply(MetadataWish(rbac=gone))
    assert done == [
        *[("DROP", "grant", role)] * 4,
        ("DROP", "member", role),
        ("DROP", "role", role),
    ]
    for _ in range(2):
        await bench.sink.change_credential(CredentialChange(CredentialAction.DELETE, user))
    left = await bench.sink.look_at_metadata(MetadataWish(rbac=RbacWish(users=(user,))))
    assert [each.difference.kind for each in left.repairs] == ["user"]


async def test_a_flush_of_what_is_there(bench: Bench) -> None:
    await bench.sink.ensure_database(bench.database)
    sample = await bench.collection("blue")
    await bench.sink.flush(sample.want())
