"""The schema asked for at the sink, and what fits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from milvus_cdc.errors import BugError, UserError
from milvus_cdc.model import Collection, Index
from milvus_cdc.sink.differences import SeenIndex, index_differs
from milvus_cdc.sink.milvus import schema as schemas
from pymilvus.grpc_gen import schema_pb2
from pymilvus.grpc_gen.schema_pb2 import DataType

from tests.contract.sink_samples import KEY, META, NUMBER, PLAIN, SCALARS, VECTOR, Field, Sample

WHOLE = Sample("db", "c", (KEY, *SCALARS, VECTOR, META))


def made(want: Collection) -> Any:
    return schema_pb2.CollectionSchema.FromString(schemas.create_request(want).schema)


def test_what_is_created_fits() -> None:
    schema = made(WHOLE.want())
    assert [field.name for field in schema.fields] == [
        each.name for each in (KEY, *SCALARS, VECTOR)
    ]
    assert schema.enable_dynamic_field
    schemas.check_fits(WHOLE.want(), schema)


def test_auto_id_becomes_an_ordinary_key() -> None:
    want = Sample("db", "c", (replace(KEY, auto_id=True), VECTOR)).want()
    assert not made(want).fields[0].autoID
    assert made(want).fields[0].is_primary_key
    assert schemas.conditions(want)[0][0] == "AUTO_ID_KEYS"
    assert schemas.conditions(WHOLE.want()) == ()


def test_what_later_versions_declare_is_kept() -> None:
    schema = schema_pb2.CollectionSchema.FromString(WHOLE.want().schema)
    number = schema.fields.add(fieldID=300, name="later", data_type=DataType.Int64, nullable=True)
    number.default_value.long_data = 5
    number.is_clustering_key = True
    number.index_params.add(key="index_type", value="FLAT")
    schema.functions.add(name="bm25", input_field_names=["s"])
    want = replace(WHOLE.want(), schema=schema.SerializeToString())
    later = made(want).fields[-1]
    assert later.nullable
    assert later.is_clustering_key
    assert later.default_value.long_data == 5
    assert not later.index_params
    assert made(want).functions[0].name == "bm25"


def test_a_schema_without_a_key_is_a_bug() -> None:
    with pytest.raises(BugError):
        schemas.conditions(Sample("db", "c", (VECTOR,)).want())


def blamed(want: Collection, there: Any) -> str:
    with pytest.raises(UserError) as failed:
        schemas.check_fits(want, there)
    assert failed.value.reason == "SCHEMA_MISMATCH"
    assert repr(failed.value.field) in failed.value.message
    return failed.value.field


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("n", lambda f: setattr(f, "data_type", DataType.Int32)),
        ("n", lambda f: setattr(f, "nullable", True)),
        ("n", lambda f: setattr(f, "is_partition_key", True)),
        ("n", lambda f: setattr(f, "name", "m")),
        ("n", lambda f: setattr(f, "data_type", 999)),
        ("id", lambda f: setattr(f, "autoID", True)),
        ("id", lambda f: setattr(f, "is_primary_key", False)),
        ("v", lambda f: setattr(f.type_params[0], "value", "9")),
        ("v", lambda f: f.ClearField("type_params")),
    ],
)
def test_the_field_that_does_not_fit_is_named(name: str, change: Callable[[Any], None]) -> None:
    want = Sample("db", "c", PLAIN).want()
    there = made(want)
    change(next(field for field in there.fields if field.name == name))
    assert blamed(want, there) == name


def test_arrays_differ_by_their_elements() -> None:
    array = Field("a", DataType.Array, element=DataType.Int32, params={"max_capacity": "5"})
    want = Sample("db", "c", (KEY, array)).want()
    for change in (
        {"element": DataType.Int64},
        {"params": {"max_capacity": "6"}},
    ):
        there = made(Sample("db", "c", (KEY, replace(array, **change))).want())
        assert blamed(want, there) == "a"


def test_order_ids_and_other_params_do_not_matter() -> None:
    want = Sample("db", "c", PLAIN).want()
    there = made(Sample("db", "c", (NUMBER, VECTOR, KEY)).want())
    there.fields[0].type_params.add(key="mmap.enabled", value="true")
    schemas.check_fits(want, there)


# ---- indexes


def described(field: str = "v", **params: str) -> SeenIndex:
    return SeenIndex("i", field, params)


def same_index(wanted: Index, found: SeenIndex) -> bool:
    return not index_differs(wanted, found)


def index(**params: str) -> Index:
    return Index(1, "i", 101, "v", tuple(sorted(params.items())), 1)


def test_an_index_is_the_same_wherever_a_version_keeps_its_parameters() -> None:
    ours = index(index_type="HNSW", metric_type="L2", params='{"M": 8, "efConstruction": 64}')
    flat = {"M": "8", "efConstruction": "64"}
    assert same_index(ours, described(index_type="hnsw", metric_type="l2", **flat))
    assert same_index(
        ours, described(index_type="HNSW", metric_type="L2", params='{"efConstruction":64,"M":"8"}')
    )
    assert same_index(ours, described(index_type="HNSW", metric_type="L2"))
    assert same_index(replace(ours, params=(*ours.params, ("dim", "4"))), described(dim="8"))
    assert not same_index(ours, described(index_type="HNSW", metric_type="IP", **flat))
    assert not same_index(ours, described(index_type="HNSW", metric_type="L2", M="16"))
    assert not same_index(ours, described("w", index_type="HNSW", metric_type="L2", **flat))
    assert same_index(index(params="no json"), described(params="[1]"))
