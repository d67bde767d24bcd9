"""What a version can hold, from its name alone, and how what it cannot is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.milvus_protos import schema_pb2
from milvus_cdc.model import Collection, Index, Load, LoadKind, Partition
from milvus_cdc.sink.milvus import capabilities
from milvus_cdc.sink.milvus.capabilities import Capabilities, by_version

DataType = schema_pb2.DataType
LITE_2 = capabilities._LITE_2


def collection(*fields: Any, database: str = "default", **options: Any) -> Collection:
    key = schema_pb2.FieldSchema(
        fieldID=100, name="id", data_type=DataType.Int64, is_primary_key=True
    )
    schema = schema_pb2.CollectionSchema(name="c", fields=[key, *fields])
    return Collection(1, 1, database, "c", schema.SerializeToString(), 1, 0, 1, **options)


def field(name: str, kind: int, **options: Any) -> Any:
    return schema_pb2.FieldSchema(fieldID=101, name=name, data_type=kind, **options)


@pytest.mark.parametrize(
    ("version", "upsert", "count", "nullable", "arrays"),
    [
        ("v2.2.16-lite", False, False, False, False),
        ("v2.3.5", True, True, False, True),
        ("2.4.15", True, True, False, True),
        ("v2.5.4", True, True, True, True),
        ("v2.6.1", True, True, True, True),
        ("milvus_lite-3.2.2", False, True, True, True),
        ("3f2a9c1-dirty", True, True, True, True),
    ],
)
def test_a_version_tells_what_it_can_hold(
    version: str, upsert: bool, count: bool, nullable: bool, arrays: bool
) -> None:
    known = by_version(version)
    assert (known.upsert, known.count, known.nullable) == (upsert, count, nullable)
    assert (DataType.Array in known.field_types) == arrays
    assert version in (known.version, known.name)


@pytest.mark.parametrize(
    ("known", "want", "named"),
    [
        (by_version("v2.2.16"), collection(field("tags", DataType.Array)), "field 'tags'"),
        (by_version("v2.3.5"), collection(field("v", DataType.SparseFloatVector)), "field 'v'"),
        (by_version("v2.4.1"), collection(field("n", DataType.Int64, nullable=True)), "nullable"),
        (by_version("milvus_lite-3.2.2"), collection(field("b", DataType.BinaryVector)), "'b'"),
        (LITE_2, collection(database="shop"), "database 'shop'"),
        (LITE_2, collection(partitions=(Partition(2, "p1", 1),)), "partition 'p1'"),
        (LITE_2, collection(field("t", DataType.VarChar, is_partition_key=True)), "field 't'"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(
    known: Capabilities, want: Collection, named: str
) -> None:
    with pytest.raises(UserError, match=named) as refused:
        known.check(want)
    assert refused.value.reason == "UNSUPPORTED_BY_SINK"
    assert want.full_name in refused.value.message


def test_what_can_be_held_is_not() -> None:
    want = collection(field("v", DataType.FloatVector), partitions=(Partition(2, "_default", 1),))
    for known in (by_version("v2.2.16"), by_version("v2.5.0"), LITE_2):
        known.check(want)
    by_version("v2.2.16").check(replace(want, database="shop"))


def test_an_index_counts_only_when_asked() -> None:
    index = Index(7, "fast", 101, "v", (("index_type", "HNSW"), ("metric_type", "L2")), 1)
    want = collection(field("v", DataType.FloatVector), indexes=(index,))
    assert LITE_2.violations(want, indexes=False) == []
    [why] = LITE_2.violations(want)
    assert "'fast'" in why
    assert "AUTOINDEX" in why
    assert by_version("v2.2.16").violations(want) == []
    cosine = replace(index, params=(("index_type", "HNSW"), ("metric_type", "COSINE")))
    assert by_version("v2.2.16").violations(replace(want, indexes=(cosine,)))


@pytest.mark.parametrize("key", ["it's", "two\nlines", "tab\t", "\x00"])
def test_a_key_that_could_not_be_deleted_again_is_refused(key: str) -> None:
    LITE_2.check_keys("default.c", ("plain", 'quo"ted', "back\\slash", "漢字"))
    with pytest.raises(UserError, match="UNSUPPORTED_BY_SINK"):
        LITE_2.check_keys("default.c", ("plain", key))
    by_version("v2.3.5").check_keys("default.c", (key,))


def test_a_server_that_loads_collections_whole_serves_all_of_one() -> None:
    want = replace(collection(), load=Load(LoadKind.PARTITIONS, (7,), 1))
    assert by_version("v2.3.5").loadable(want) is want
    assert by_version("milvus_lite-3.2.2").loadable(want).load == Load(LoadKind.COLLECTION, (), 1)
