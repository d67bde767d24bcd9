"""Aliases, roles and flushes in the controller's core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from milvus_cdc.model import (
    Alias,
    Carry,
    Rbac,
    RoleGrant,
    collection_assignment_id,
    metadata_assignment_id,
)
from milvus_cdc.selection import Selection
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.mapping import NameRule
from milvus_cdc_controller.core.task import MetadataRecord
from milvus_cdc_controller.store.records import decode, encode

from tests.unit.controller.world import Script, collection, dropped, spec

UID = "uid-copy"
META = metadata_assignment_id(UID)


def alias(name: str, collection_id: int, ts: int = 50) -> Alias:
    return Alias(1, "default", name, collection_id, ts)


class Bench:
    """A task with a replicator; `world` is what the source shows."""

    def __init__(self, *collections: Any, **task: Any) -> None:
        self.script = Script()
        self.script.create(spec(**task))
        self.seen: dict[str, Any] = {"aliases": (), "rbac": Rbac()}
        self.collections = list(collections)
        self.show()
        self.script.hello(1, "r")

    def show(self, **changes: Any) -> None:
        self.seen.update(changes)
        self.script.see(*self.collections, **self.seen)

    @property
    def metadata(self) -> MetadataRecord:
        return self.script.core.world.metadata[UID]

    @property
    def standing(self) -> dict[str, str]:
        return {wish.alias: wish.collection for wish in self.metadata.aliases}

    def epoch(self, assignment_id: str) -> int:
        return self.script.core.world.grants[assignment_id].epoch

    def reach(self, collection_id: int, ts: int, *, closed: bool = False) -> None:
        """The collection is opened and everything at or below `ts` durable."""
        key = collection_assignment_id(UID, collection_id)
        points = self.script.core.world.progress[key].checkpoints
        self.script.report(
            1,
            key,
            self.epoch(key),
            opened=ev.SinkOpened(collection_id + 1000),
            vchannels=tuple(
                ev.VchannelReport(point.vchannel, b"at", ts, closed) for point in points
            ),
        )

    def applied(self, **other: Any) -> None:
        """The replicator has done all it was told."""
        version = self.metadata.version
        self.script.report(
            1, META, self.epoch(META), applied_version=version, aliases_version=version, **other
        )

    def drop_granted(self, collection_id: int) -> bool:
        return self.script.core.world.collections[UID][collection_id].drop_granted


def test_an_alias_waits_for_the_rows_that_are_older_than_it() -> None:
    bench = Bench(collection(1))
    bench.show(aliases=(alias("live", 1, ts=50),))
    assert bench.standing == {}
    bench.reach(1, 49)
    assert bench.standing == {}
    bench.reach(1, 50)
    assert bench.standing == {"live": "books"}
    (sent,) = bench.script.sent(fx.Assign, 1)
    assert sent.metadata == bench.metadata


def test_a_switch_keeps_the_old_target_until_the_new_one_is_ready() -> None:
    bench = Bench(collection(1, "blue"), collection(2, "green"))
    bench.reach(1, 60)
    bench.reach(2, 60)
    bench.show(aliases=(alias("live", 1),))
    assert bench.standing == {"live": "blue"}
    bench.show(aliases=(alias("live", 2, ts=90),))
    assert bench.standing == {"live": "blue"}
    bench.reach(2, 95)
    assert bench.standing == {"live": "green"}
    assert not bench.metadata.dropped_aliases


def test_an_alias_that_is_gone_is_named_until_its_end_is_confirmed() -> None:
    bench = Bench(collection(1))
    bench.reach(1, 60)
    bench.show(aliases=(alias("live", 1),))
    bench.applied()
    bench.show(aliases=())
    assert bench.metadata.dropped_aliases == (("default", "live", 1),)
    version = bench.metadata.version
    bench.show()
    assert bench.metadata.version == version
    bench.applied()
    assert not bench.metadata.dropped_aliases
    assert bench.metadata.version == version


def test_a_drop_waits_until_no_alias_of_ours_can_stand_for_the_collection() -> None:
    bench = Bench(collection(1, "old"), collection(2, "new"))
    bench.reach(1, 60)
    bench.reach(2, 60)
    bench.show(aliases=(alias("live", 1),))
    bench.applied()
    bench.collections[0] = dropped(bench.collections[0])
    bench.show(aliases=(alias("live", 2, ts=90),))
    bench.reach(1, 99, closed=True)
    assert not bench.drop_granted(1)
    bench.reach(2, 95)
    assert bench.standing == {"live": "new"}
    assert not bench.drop_granted(1)
    bench.applied()
    assert bench.drop_granted(1)


def test_a_drop_does_not_wait_for_what_else_is_in_the_way() -> None:
    bench = Bench(collection(1))
    bench.reach(1, 60)
    bench.show(aliases=(alias("live", 1),))
    bench.applied()
    bench.collections[0] = dropped(bench.collections[0])
    bench.show(aliases=())
    bench.reach(1, 99, closed=True)
    assert not bench.drop_granted(1)
    # Something that is no alias is refused at the sink.
    bench.script.report(
        1,
        META,
        bench.epoch(META),
        state=ReportedState.RETRYING,
        reason="SINK_PERMISSION_DENIED",
        aliases_version=bench.metadata.version,
    )
    assert bench.drop_granted(1)


def test_an_alias_takes_the_name_of_a_collection_only_when_that_is_gone() -> None:
    bench = Bench(collection(1, "orders"), collection(2, "next"))
    bench.reach(1, 60)
    bench.reach(2, 60)
    bench.collections[0] = dropped(bench.collections[0])
    bench.show(aliases=(alias("orders", 2),))
    assert bench.standing == {}
    bench.reach(1, 99, closed=True)
    key = collection_assignment_id(UID, 1)
    bench.script.report(1, key, bench.epoch(key), dropped=True)
    assert bench.standing == {"orders": "next"}


def test_a_collection_takes_the_name_of_an_alias_only_when_that_is_gone() -> None:
    bench = Bench(collection(1, "next"))
    bench.reach(1, 60)
    bench.show(aliases=(alias("orders", 1),))
    bench.applied()
    bench.collections.append(collection(2, "orders"))
    bench.show(aliases=())
    assert not bench.script.core.world.collections[UID][2].holds_name
    bench.applied()
    assert bench.script.core.world.collections[UID][2].holds_name


def test_only_aliases_of_followed_collections_are_touched() -> None:
    task = {"selection": Selection(("default.our_*",))}
    bench = Bench(collection(1, "our_one"), collection(2, "theirs"), **task)
    bench.reach(1, 60)
    bench.show(aliases=(alias("a", 1), alias("b", 2)))
    assert bench.standing == {"a": "our_one"}
    bench.applied()
    # It stands for something else at the source now, which is not at the sink.
    bench.show(aliases=(alias("a", 2, ts=70), alias("b", 2)))
    assert bench.metadata.dropped_aliases == (("default", "a", 1),)


def test_an_alias_lives_where_its_collection_is_called_to() -> None:
    rules = (NameRule("default.books", "shop.tomes"), NameRule("default.x_*", "shop.y_*"))
    followed = Selection(("default.*",))
    bench = Bench(collection(1, "books"), rename=rules, selection=followed)
    bench.reach(1, 60)
    bench.show(aliases=(alias("live", 1), alias("x_live", 1)))
    places = {(wish.database, wish.alias, wish.collection) for wish in bench.metadata.aliases}
    assert places == {("shop", "live", "tomes"), ("shop", "y_live", "tomes")}


def test_a_collection_made_anew_at_the_sink_gets_its_alias_again() -> None:
    bench = Bench(collection(1))
    bench.reach(1, 60)
    bench.show(aliases=(alias("live", 1),))
    bench.applied()
    version = bench.metadata.version
    world = bench.script.core.world
    world.put_collection(replace(world.collections[UID][1], sink_collection_id=77))
    bench.show()
    assert bench.metadata.version == version + 1


def test_what_is_known_of_aliases_survives_a_restart() -> None:
    bench = Bench(collection(1))
    bench.reach(1, 60)
    bench.show(aliases=(alias("live", 1),))
    stored = {key: decode(key, encode(record)) for key, record in bench.script.stored.items()}
    again = Script(stored)
    assert again.core.world.metadata[UID] == bench.metadata
    again.see(*bench.collections, aliases=())
    assert again.core.world.metadata[UID].dropped_aliases == (("default", "live", 1),)


def test_without_schema_no_alias_is_wanted_nor_dropped() -> None:
    bench = Bench(collection(1), carry=Carry(schema=False))
    bench.reach(1, 60)
    bench.show(aliases=(alias("live", 1),))
    assert (bench.metadata.aliases, bench.metadata.dropped_aliases) == ((), ())


# ---- roles

GRANT = RoleGrant("reader", "Collection", "books", "default", "Search")
WILD = RoleGrant("reader", "Global", "*", "*", "CreateCollection")
RBAC = Rbac(users=("ann",), roles=("reader",), members=(("ann", "reader"),), grants=(GRANT, WILD))


def test_roles_are_carried_only_when_asked_for() -> None:
    bench = Bench(collection(1))
    bench.show(rbac=RBAC)
    assert bench.metadata.rbac is None
    bench = Bench(collection(1), carry=Carry(rbac=True))
    bench.show(rbac=RBAC)
    assert bench.metadata.rbac == RBAC


def test_what_we_gave_and_the_source_took_back_is_taken_back() -> None:
    bench = Bench(collection(1), carry=Carry(rbac=True))
    bench.show(rbac=RBAC)
    bench.applied()
    bench.show(rbac=Rbac(users=("ann",), roles=("reader",), grants=(WILD,)))
    gone = bench.metadata.dropped_rbac
    assert (gone.members, gone.grants, gone.roles) == ((("ann", "reader"),), (GRANT,), ())
    # Given again before the end of it is confirmed.
    bench.show(rbac=RBAC)
    assert bench.metadata.dropped_rbac == Rbac()
    bench.applied()
    bench.show(rbac=Rbac())
    assert bench.metadata.dropped_rbac.roles == ("reader",)
    bench.applied()
    bench.show()
    assert bench.metadata.dropped_rbac == Rbac()


def test_a_grant_on_what_is_not_followed_is_left_out_and_names_are_mapped() -> None:
    bench = Bench(
        collection(1),
        carry=Carry(rbac=True),
        selection=Selection(("default.*",)),
        rename=(NameRule("default.*", "shop.copy_*"),),
    )
    other = RoleGrant("reader", "Collection", "books", "elsewhere", "Search")
    bench.show(rbac=Rbac(roles=("reader",), grants=(GRANT, other, WILD)))
    assert bench.metadata.rbac is not None
    assert bench.metadata.rbac.grants == (
        RoleGrant("reader", "Collection", "copy_books", "shop", "Search"),
        WILD,
    )


def test_remarks_of_the_metadata_assignment_are_kept() -> None:
    bench = Bench(collection(1), carry=Carry(rbac=True))
    bench.applied(conditions=(("CREDENTIAL_NEEDED", "ann"),))
    assert bench.metadata.conditions == (("CREDENTIAL_NEEDED", "ann"),)
    bench.applied()
    assert not bench.metadata.conditions


# ---- the operations channel


def test_a_flush_is_remembered_with_the_place_behind_it() -> None:
    topic = "by-dev-rootcoord-dml_1"
    books = collection(1)
    books = replace(
        books, vchannels=(replace(books.vchannels[0], pchannel=topic, vchannel=f"{topic}_1v0"),)
    )
    bench = Bench(books)
    assert bench.metadata.operations_channel == "by-dev-replicate-msg"
    bench.show(aliases=(alias("live", 1),))
    bench.reach(1, 60)
    flush = ev.FlushSeen(70, "default", ("live",))
    bench.script.report(
        1, META, bench.epoch(META), flushes=(flush,), operations_read_from=b"behind"
    )
    assert bench.metadata.operations_read_from == b"behind"
    record = bench.script.core.world.collections[UID][1]
    assert record.flush_ts == 70
    key = record.assignment_id
    (sent,) = [m for m in bench.script.sent(fx.Assign, 1) if m.assignment_id == key]
    assert sent.collection is not None
    assert sent.collection.flush_ts == 70
    bench.script.report(1, key, bench.epoch(key), flushed_ts=70)
    assert bench.script.core.world.collections[UID][1].flush_ts == 0
    # The same again, as after a restart of the replicator, for a collection made since: nothing.
    old = ev.FlushSeen(5, "default", ("books",))
    bench.script.report(1, META, bench.epoch(META), flushes=(old,))
    assert bench.script.core.world.collections[UID][1].flush_ts == 0


def test_without_flush_and_rbac_the_channel_is_left_alone() -> None:
    bench = Bench(collection(1), carry=Carry(flush=False))
    assert bench.metadata.operations_channel == ""
