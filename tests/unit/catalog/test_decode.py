"""Decoding a source's metadata: a real 2.3.5 dump, the 2.2 layout, and bad values."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_cdc.catalog import Assembly, Layout, decode_catalogue
from milvus_cdc.errors import BugError
from milvus_cdc.model import (
    Alias,
    Catalogue,
    Collection,
    Load,
    LoadKind,
    ObjectState,
    Rbac,
    RoleGrant,
    Vchannel,
)
from milvuscdc.internal import milvus_meta_pb2 as pb
from pymilvus.grpc_gen import milvus_pb2, schema_pb2

LAYOUT = Layout("by-dev")
META = "by-dev/meta/"
TOMBSTONE = b"\xe2\x9b\xbc"
C1, C10 = 470605299854082291, 470605299854486172
INFO, FIELDS = f"{META}root-coord/database/collection-info/1/", f"{META}root-coord/fields/"
_DUMP = Path(__file__).parents[2] / "vectors" / "golden_etcd_2.3.5.json"
GOLDEN = {key: base64.b64decode(text) for key, text in json.loads(_DUMP.read_text()).items()}


def schema_of(collection: Collection) -> schema_pb2.CollectionSchema:
    return schema_pb2.CollectionSchema.FromString(collection.schema)


def by_id(catalogue: Catalogue) -> dict[int, Collection]:
    return {each.collection_id: each for each in catalogue.collections}


class TestGolden:
    catalogue = decode_catalogue(GOLDEN, LAYOUT, cluster_id=7, revision=9)

    def test_says_where_it_comes_from(self) -> None:
        assert (self.catalogue.cluster_id, self.catalogue.revision) == (7, 9)
        assert self.catalogue.tso == 0
        assert self.catalogue.databases_keyed
        assert self.catalogue.incarnation > 0

    def test_a_tombstone_is_no_database(self) -> None:
        assert [each.name for each in self.catalogue.databases] == ["default"]

    def test_a_living_collection(self) -> None:
        c1 = by_id(self.catalogue)[C1]
        assert (c1.full_name, c1.state, c1.drop_ts) == ("default.c1", ObjectState.CREATED, 0)
        assert (c1.shards, c1.create_ts) == (2, 470605312366215177)
        schema = schema_of(c1)
        assert [(each.fieldID, each.name) for each in schema.fields] == [
            (0, "RowID"),
            (1, "Timestamp"),
            (100, "id"),
            (101, "v"),
            (102, "s"),
            (103, "j"),
            (104, "$meta"),
        ]
        assert schema.description == "d"
        assert schema.enable_dynamic_field
        assert c1.vchannels == tuple(
            Vchannel(
                f"by-dev-rootcoord-dml_{shard}_{C1}v{shard}",
                f"by-dev-rootcoord-dml_{shard}",
                bytes(8),
            )
            for shard in (0, 1)
        )

    def test_partitions_and_a_dropped_one(self) -> None:
        default, p1 = by_id(self.catalogue)[C1].partitions
        assert (default.name, default.state, default.drop_ts) == ("_default", "CREATED", 0)
        assert (p1.name, p1.state, p1.drop_ts) == ("p1", "DROPPED", 470605314437152772)
        assert p1.create_ts == 470605312366215184

    def test_an_index_as_it_was_asked_for(self) -> None:
        (index,) = by_id(self.catalogue)[C1].indexes
        assert (index.name, index.field_id, index.field_name) == ("v", 101, "v")
        assert dict(index.params) == {"index_type": "FLAT", "metric_type": "L2"}
        assert index.create_ts > 0

    def test_an_alias(self) -> None:
        (alias,) = self.catalogue.aliases
        assert (alias.database, alias.name, alias.collection_id) == ("default", "al1", C1)
        snapshot = next(key for key in GOLDEN if "/aliases/1/al1_ts" in key)
        assert alias.alter_ts == int(snapshot.rpartition("_ts")[2])

    def test_a_collection_being_dropped(self) -> None:
        c10 = by_id(self.catalogue)[C10]
        assert (c10.name, c10.state, c10.drop_ts) == ("c10", "DROPPED", 470605514190880771)
        assert c10.properties == (("collection.ttl.seconds", "1800"),)
        # Milvus leaves them in state Created until it removes them.
        assert {each.state for each in c10.partitions} == {ObjectState.DROPPED}
        assert [(each.name, each.drop_ts) for each in c10.partitions] == [
            ("_default", 470605514190880771),
            ("pp", 470605513405235205),
        ]

    @pytest.mark.parametrize(
        "key",
        [f"{INFO}{C1}", f"{FIELDS}{C1}/100", f"{META}root-coord/partitions/{C1}/{C1 + 1}"],
    )
    @pytest.mark.parametrize("value", [b"", b"\xff\xff\xff", b"\x08\x05"])
    def test_a_bad_value_is_named(self, key: str, value: bytes) -> None:
        assert key in GOLDEN
        with pytest.raises(BugError, match=key) as caught:
            decode_catalogue({**GOLDEN, key: value}, LAYOUT)
        assert caught.value.reason == "SOURCE_METADATA_UNDECODABLE"

    def test_other_roots_are_not_seen(self) -> None:
        assert decode_catalogue(GOLDEN, Layout("by-de")).collections == ()
        assert decode_catalogue(GOLDEN, Layout("by-dev", "metal")).databases == ()

    def test_a_collection_without_fields_is_not_believed(self) -> None:
        keys = {key: value for key, value in GOLDEN.items() if not key.startswith(FIELDS)}
        with pytest.raises(BugError, match="no fields"):
            decode_catalogue(keys, LAYOUT)


def collection(collection_id: int, name: str, **more: object) -> bytes:
    info = pb.CollectionInfo(
        id=collection_id,
        schema=schema_pb2.CollectionSchema(name=name).SerializeToString(),
        create_time=5,
        shards_num=1,
        virtual_channel_names=[f"t_0_{collection_id}v0"],
        physical_channel_names=["t_0"],
        **more,  # type: ignore[arg-type]
    )
    return info.SerializeToString()


def field_value(field_id: int, name: str) -> bytes:
    value: bytes = schema_pb2.FieldSchema(fieldID=field_id, name=name).SerializeToString()
    return value


TSO_VALUE = bytes.fromhex("18e9fab7c30a2690")
TSO = {"by-dev/kv/gid/timestamp": TSO_VALUE}
LEGACY = {
    **TSO,
    f"{META}root-coord/credential/users/root": b"{}",
    f"{META}root-coord/collection/44": collection(44, "old"),
    f"{META}root-coord/fields/44/100": field_value(100, "id"),
    f"{META}root-coord/partitions/44/45": pb.PartitionInfo(
        partition_id=45, partition_name="_default", collection_id=44
    ).SerializeToString(),
}
DEFAULT = {
    f"{META}root-coord/database/db-info/1": pb.DatabaseInfo(
        id=1, name="default", state=1, created_time=77
    ).SerializeToString()
}


class TestLayoutOf22:
    def test_its_collections_are_in_the_default_database(self) -> None:
        catalogue = decode_catalogue(LEGACY, LAYOUT)
        (old,) = catalogue.collections
        assert (old.full_name, old.database_id) == ("default.old", 1)
        assert [each.name for each in old.partitions] == ["_default"]
        assert [each.name for each in catalogue.databases] == ["default"]
        assert not catalogue.databases_keyed

    def test_without_collections_there_is_still_a_database(self) -> None:
        keys = {key: value for key, value in LEGACY.items() if "44" not in key}
        catalogue = decode_catalogue(keys, LAYOUT)
        assert [each.database_id for each in catalogue.databases] == [1]
        assert not catalogue.databases_keyed

    def test_after_an_upgrade_the_old_keys_still_count(self) -> None:
        catalogue = decode_catalogue({**LEGACY, **DEFAULT}, LAYOUT)
        assert [each.full_name for each in catalogue.collections] == ["default.old"]
        assert catalogue.databases_keyed
        assert catalogue.incarnation == 77

    def test_its_drops_are_dated_by_snapshots_too(self) -> None:
        keys = {
            **LEGACY,
            f"{META}root-coord/collection/44": collection(44, "old", state=2),
            f"{META}snapshots/root-coord/collection/44_ts5": b"",
            f"{META}snapshots/root-coord/collection/44_ts60": b"",
        }
        (old,) = decode_catalogue(keys, LAYOUT).collections
        assert (old.state, old.drop_ts) == (ObjectState.DROPPED, 60)

    def test_a_wiped_database_key_is_not_taken_for_22(self) -> None:
        keys = {key: value for key, value in GOLDEN.items() if "/db-info/" not in key}
        catalogue = decode_catalogue(keys, LAYOUT)
        assert catalogue.databases_keyed
        assert catalogue.databases == ()


class TestStates:
    def catalogue(self, *, state: int, partition_state: int = 0) -> Catalogue:
        partition = pb.PartitionInfo(
            partition_id=45, partition_name="p", collection_id=44, state=partition_state
        )
        return decode_catalogue(
            {
                **LEGACY,
                f"{META}root-coord/collection/44": collection(44, "old", state=state),
                f"{META}root-coord/partitions/44/45": partition.SerializeToString(),
            },
            LAYOUT,
        )

    def test_creating_is_not_there_yet(self) -> None:
        assert self.catalogue(state=1).collections == ()
        (old,) = self.catalogue(state=0, partition_state=1).collections
        assert old.partitions == ()

    @pytest.mark.parametrize("state", [2, 3])
    def test_dropping_and_dropped_are_dropped(self, state: int) -> None:
        assert self.catalogue(state=state).collections[0].state is ObjectState.DROPPED
        (old,) = self.catalogue(state=0, partition_state=state).collections
        assert (old.state, old.partitions[0].state) == ("CREATED", "DROPPED")

    def test_an_unknown_state_is_a_bug(self) -> None:
        with pytest.raises(BugError, match="unknown state 9"):
            self.catalogue(state=9)

    def test_the_clock(self) -> None:
        catalogue = decode_catalogue(LEGACY, LAYOUT)
        assert catalogue.tso == (0x18E9FAB7C30A2690 // 1_000_000) << 18
        older = {"by-dev/kv/tso/timestamp": bytes(7) + b"\x01"}
        assert decode_catalogue({**LEGACY, **older}, LAYOUT).tso == catalogue.tso
        assert decode_catalogue(dict.fromkeys(["by-dev/kv/tso/timestamp"], TSO_VALUE), LAYOUT).tso
        with pytest.raises(BugError, match="timestamp"):
            decode_catalogue({"by-dev/kv/gid/timestamp": b"123"}, LAYOUT)


class TestIndexAndLoad:
    def index(self, **info: object) -> Collection:
        value = pb.FieldIndex(
            index_info=pb.IndexInfo(
                collection_id=44,
                field_id=100,
                index_id=9,
                index_params=[pb.KeyValue(key="index_type", value="HNSW")],
                **info,  # type: ignore[arg-type]
            )
        )
        keys = {**LEGACY, f"{META}field-index/44/9": value.SerializeToString()}
        (old,) = decode_catalogue(keys, LAYOUT).collections
        return old

    def test_what_the_user_asked_for_wins(self) -> None:
        asked = [pb.KeyValue(key="index_type", value="AUTOINDEX")]
        (index,) = self.index(user_index_params=asked).indexes
        assert index.params == (("index_type", "AUTOINDEX"),)

    def test_else_what_was_built(self) -> None:
        (index,) = self.index(type_params=[pb.KeyValue(key="x", value="1")]).indexes
        assert index.params == (("index_type", "HNSW"), ("x", "1"))

    def test_parameters_folded_into_json(self) -> None:
        asked = [
            pb.KeyValue(key="index_type", value="HNSW"),
            pb.KeyValue(key="params", value='{"M": 8, "mmap": true, "x": "y"}'),
        ]
        (index,) = self.index(user_index_params=asked).indexes
        assert dict(index.params) == {"index_type": "HNSW", "M": "8", "mmap": "true", "x": "y"}

    def test_a_deleted_index_is_none(self) -> None:
        value = pb.FieldIndex(index_info=pb.IndexInfo(index_id=9, field_id=100), deleted=True)
        keys = {**LEGACY, f"{META}field-index/44/9": value.SerializeToString()}
        assert decode_catalogue(keys, LAYOUT).collections[0].indexes == ()

    def test_load(self) -> None:
        info = pb.CollectionLoadInfo(collection_id=44, replica_number=2, load_type=1)
        part = pb.PartitionLoadInfo(collection_id=44, partition_id=45)
        keys = {
            **LEGACY,
            f"{META}querycoord-collection-loadinfo/44": info.SerializeToString(),
            f"{META}querycoord-partition-loadinfo/44/45": part.SerializeToString(),
        }
        load = decode_catalogue(keys, LAYOUT).collections[0].load
        assert (load.kind, load.partition_ids, load.replicas) == (LoadKind.PARTITIONS, (45,), 2)

    @pytest.mark.parametrize(
        ("status", "loaded", "wanted"),
        [
            (2, (45,), Load(LoadKind.COLLECTION, (), 1)),
            (2, (46,), Load(LoadKind.PARTITIONS, (46,), 1)),
            (1, (46,), Load(LoadKind.COLLECTION, (), 1)),
            (2, (), Load(LoadKind.COLLECTION, (), 1)),
        ],
        ids=["whole", "one released", "still loading", "keys to come"],
    )
    def test_a_partition_released_of_a_whole(
        self, status: int, loaded: tuple[int, ...], wanted: Load
    ) -> None:
        info = pb.CollectionLoadInfo(collection_id=44, replica_number=1, load_type=2, status=status)
        keys = {**LEGACY, f"{META}querycoord-collection-loadinfo/44": info.SerializeToString()}
        for each in loaded:
            part = pb.PartitionLoadInfo(collection_id=44, partition_id=each, status=2)
            key = f"{META}querycoord-partition-loadinfo/44/{each}"
            keys[key] = part.SerializeToString()
        assert decode_catalogue(keys, LAYOUT).collections[0].load == wanted

    def test_loads_of_22(self) -> None:
        part = pb.PartitionLoadInfo(collection_id=44, partition_id=45, replica_number=3)
        key = f"{META}querycoord-partition-loadinfo/44/45"
        load = decode_catalogue({**LEGACY, key: part.SerializeToString()}, LAYOUT)
        kinds = [each.load for each in load.collections]
        assert kinds == [Load(LoadKind.PARTITIONS, (45,), 3)]
        for released, wanted in (
            ((), Load(LoadKind.COLLECTION, (), 1)),
            ((46,), Load(LoadKind.PARTITIONS, (45,), 1)),
        ):
            info = pb.CollectionLoadInfo(
                collection_id=44, replica_number=1, released_partitions=released
            )
            key = f"{META}querycoord-collection-loadinfo/44"
            catalogue = decode_catalogue({**LEGACY, key: info.SerializeToString()}, LAYOUT)
            assert catalogue.collections[0].load == wanted


class TestChangeByChange:
    @settings(max_examples=60, deadline=None)
    @given(st.permutations(sorted(GOLDEN)), st.sets(st.integers(0, len(GOLDEN))))
    def test_order_and_pauses_do_not_matter(self, keys: list[str], pauses: set[int]) -> None:
        assembly = Assembly(LAYOUT)
        for number, key in enumerate(keys):
            assembly.apply(key, GOLDEN[key])
            if number in pauses:
                try:
                    assembly.catalogue(0, 0)
                except BugError as error:
                    # Half of a collection, as no transaction leaves it.
                    assert "no fields" in error.message or "no field" in error.message  # noqa: PT017
        assert assembly.catalogue(0, 0) == decode_catalogue(GOLDEN, LAYOUT)

    def assembled(self, keys: dict[str, bytes]) -> Assembly:
        assembly = Assembly(LAYOUT)
        for key, value in keys.items():
            assembly.apply(key, value)
        return assembly

    def test_what_did_not_change_is_the_same_object(self) -> None:
        assembly = self.assembled(GOLDEN)
        before = by_id(assembly.catalogue(0, 1))
        assembly.apply(f"{META}field-index/{C1}/470605299854282310", None)
        after = by_id(assembly.catalogue(0, 2))
        assert after[C1].indexes == ()
        assert after[C10] is before[C10]

    def test_a_drop_step_by_step(self) -> None:
        assembly = self.assembled({**LEGACY, **DEFAULT})
        (alive,) = assembly.catalogue(0, 1).collections
        assembly.apply(f"{META}root-coord/collection/44", collection(44, "old", state=2))
        assembly.apply(f"{META}snapshots/root-coord/collection/44_ts60", b"x")
        (dropping,) = assembly.catalogue(0, 2).collections
        assert (dropping.state, dropping.drop_ts) == (ObjectState.DROPPED, 60)
        assembly.apply(f"{META}root-coord/fields/44/100", TOMBSTONE)
        assembly.apply(f"{META}root-coord/partitions/44/45", TOMBSTONE)
        (clearing,) = assembly.catalogue(0, 3).collections
        assert clearing.schema == alive.schema
        assert clearing.partitions == dropping.partitions
        assembly.apply(f"{META}root-coord/collection/44", TOMBSTONE)
        assert assembly.catalogue(0, 4).collections == ()

    def test_a_collection_being_dropped_outlives_its_database(self) -> None:
        info = f"{META}root-coord/database/db-info/"
        database = pb.DatabaseInfo(id=8, name="shop", state=1).SerializeToString()
        assembly = self.assembled(
            {
                **DEFAULT,
                f"{META}root-coord/database/collection-info/8/44": collection(44, "c", state=2),
                f"{info}8": TOMBSTONE,
                f"{META}snapshots/root-coord/database/db-info/8_ts1": database,
                f"{META}snapshots/root-coord/database/db-info/8_ts2": TOMBSTONE,
            }
        )
        catalogue = assembly.catalogue(0, 1)
        assert [each.full_name for each in catalogue.collections] == ["shop.c"]
        assert [each.name for each in catalogue.databases] == ["default"]

    def test_an_error_comes_again_until_the_value_is_mended(self) -> None:
        assembly = self.assembled({**LEGACY, **DEFAULT})
        assembly.apply(f"{META}root-coord/fields/44/100", b"\xff")
        for _ in range(2):
            with pytest.raises(BugError, match="fields/44/100"):
                assembly.catalogue(0, 1)
        assembly.apply(f"{META}root-coord/fields/44/100", field_value(100, "id"))
        assert len(assembly.catalogue(0, 2).collections) == 1


def an_alias(name: str, collection_id: int, *, created: int = 5, state: int = 0) -> bytes:
    info = pb.AliasInfo(
        alias_name=name, collection_id=collection_id, created_time=created, state=state, db_id=1
    )
    return info.SerializeToString()


DATABASE = {
    f"{META}root-coord/database/db-info/1": pb.DatabaseInfo(
        name="default", id=1, state=1
    ).SerializeToString()
}


class TestAliases:
    KEY = f"{META}root-coord/database/aliases/1/latest"

    def test_switching_moves_its_time_and_its_collection(self) -> None:
        assembly = Assembly(LAYOUT)
        for key, value in DATABASE.items():
            assembly.apply(key, value)
        assembly.apply(self.KEY, an_alias("latest", 7))
        (first,) = assembly.catalogue(1, 1).aliases
        assert first == Alias(1, "default", "latest", 7, 5)
        assembly.apply(self.KEY, an_alias("latest", 8))
        snapshot = f"{META}snapshots/root-coord/database/aliases/1/latest_ts9"
        assembly.apply(snapshot, an_alias("latest", 8))
        (second,) = assembly.catalogue(1, 2).aliases
        assert second == Alias(1, "default", "latest", 8, 9)
        assembly.apply(self.KEY, TOMBSTONE)
        assert assembly.catalogue(1, 3).aliases == ()

    def test_the_layout_without_databases(self) -> None:
        keys = {
            **DATABASE,
            f"{META}root-coord/aliases/old": an_alias("old", 7),
            f"{META}root-coord/aliases/latest": an_alias("latest", 7),
            self.KEY: an_alias("latest", 8),
        }
        found = decode_catalogue(keys, LAYOUT).aliases
        assert [(each.name, each.collection_id) for each in found] == [("latest", 8), ("old", 7)]

    def test_one_that_is_being_made_or_dropped_is_none(self) -> None:
        for state in (1, 2, 3):
            keys = {**DATABASE, self.KEY: an_alias("latest", 8, state=state)}
            assert decode_catalogue(keys, LAYOUT).aliases == ()

    @pytest.mark.parametrize("value", [b"\xff\xff", an_alias("other", 8), an_alias("latest", 0)])
    def test_a_bad_value_is_named(self, value: bytes) -> None:
        with pytest.raises(BugError, match="aliases/1/latest"):
            decode_catalogue({**DATABASE, self.KEY: value}, LAYOUT)


CREDENTIAL = f"{META}root-coord/credential/"


def test_who_may_do_what() -> None:
    group = milvus_pb2.PrivilegeGroupInfo(
        group_name="readers",
        privileges=[milvus_pb2.PrivilegeEntity(name=name) for name in ("Search", "Query")],
    )
    keys = {
        f"{CREDENTIAL}users/ann": b'{"encrypted_password":"$2a$04"}',
        f"{CREDENTIAL}roles/reader": b"",
        f"{CREDENTIAL}user-role-mapping/ann/reader": b"",
        f"{CREDENTIAL}grantee-privileges/reader/Collection/shop.orders": b"a1",
        f"{CREDENTIAL}grantee-privileges/reader/Collection/old": b"a2",
        f"{CREDENTIAL}grantee-privileges/reader/Global/*.*": b"a3",
        f"{CREDENTIAL}grantee-privileges/reader/User/default.ann": b"revoked",
        f"{CREDENTIAL}grantee-id/a1/PrivilegeInsert": b"root",
        f"{CREDENTIAL}grantee-id/a1/PrivilegeSearch": b"root",
        f"{CREDENTIAL}grantee-id/a2/PrivilegeQuery": b"root",
        f"{CREDENTIAL}grantee-id/a3/*": b"root",
        f"{CREDENTIAL}grantee-id/a3/PrivilegeGroupreaders": b"root",
        f"{META}root-coord/privilege-group/readers": group.SerializeToString(),
    }
    assert decode_catalogue(keys, LAYOUT).rbac == Rbac(
        users=("ann",),
        roles=("reader",),
        members=(("ann", "reader"),),
        grants=(
            RoleGrant("reader", "Collection", "old", "default", "Query"),
            RoleGrant("reader", "Collection", "orders", "shop", "Insert"),
            RoleGrant("reader", "Collection", "orders", "shop", "Search"),
            RoleGrant("reader", "Global", "*", "*", "*"),
            RoleGrant("reader", "Global", "*", "*", "readers"),
        ),
        privilege_groups=(("readers", ("Query", "Search")),),
    )


def test_a_revoke_and_a_removal_are_seen() -> None:
    assembly = Assembly(LAYOUT)
    grant = f"{CREDENTIAL}grantee-id/a1/PrivilegeInsert"
    assembly.apply(f"{CREDENTIAL}grantee-privileges/reader/Collection/shop.orders", b"a1")
    assembly.apply(grant, b"root")
    assembly.apply(f"{CREDENTIAL}user-role-mapping/ann/reader", b"")
    before = assembly.catalogue(1, 1).rbac
    assembly.apply(grant, None)
    assembly.apply(f"{CREDENTIAL}user-role-mapping/ann/reader", None)
    assert (len(before.grants), len(before.members)) == (1, 1)
    assert assembly.catalogue(1, 2).rbac == Rbac()


def test_properties_of_a_database() -> None:
    info = pb.DatabaseInfo(name="shop", id=7, state=1)
    info.properties.add(key="database.replica.number", value="2")
    keys = {f"{META}root-coord/database/db-info/7": info.SerializeToString()}
    (database,) = decode_catalogue(keys, LAYOUT).databases
    assert database.properties == (("database.replica.number", "2"),)
