"""Two pages of any contents: what the comparison finds is what a dictionary would find."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.milvus_protos import milvus_pb2, schema_pb2
from milvus_cdc.verify.columns import json_equal
from milvus_cdc.verify.keys import INT64_MAX, INT64_MIN, Key, KeyField
from milvus_cdc.verify.rows import Rows, compare, rows_of

FIELDS = ("f", "n", "s", "doc", "v", "tags", "half", "sparse", "maybe")
NANS = (0x7FC00000, 0x7FC00001, 0x00000000, 0x80000000, 0x3F800000)

int_keys = st.one_of(st.integers(-5, 5), st.integers(INT64_MIN, INT64_MAX))
str_keys = st.text(st.characters(codec="utf-8"), max_size=3)
rows = st.fixed_dictionaries(
    {
        "f": st.sampled_from(NANS),
        "n": st.integers(INT64_MIN, INT64_MAX) | st.integers(0, 1),
        "s": st.sampled_from(["", "é", "a"]),
        "doc": st.sampled_from([None, 1, True, "1", {"a": 1, "b": [None]}, {"b": [None], "a": 1}]),
        "v": st.tuples(st.sampled_from(NANS), st.sampled_from(NANS)),
        "tags": st.lists(st.integers(-1, 1), max_size=2),
        "half": st.binary(min_size=4, max_size=4),
        "sparse": st.sampled_from([b"", b"\x01\x00\x00\x00\x00\x00\x80\x3f"]),
        "maybe": st.none() | st.integers(0, 1),
    }
)


def _floats(words: list[int]) -> Any:
    # Through bytes: a Python float would lose which NaN it is.
    packed = b"".join(struct.pack("<I", word) for word in words)
    wire = b"\x0a" + _varint(len(packed)) + packed if packed else b""
    return schema_pb2.FloatArray.FromString(wire)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _answer(page: dict[Key, dict[str, Any]], order: list[Key], is_string: bool) -> Any:
    cells = [page[key] for key in order]
    s, v = schema_pb2.ScalarField, schema_pb2.VectorField
    ids: Any = (
        s(string_data=schema_pb2.StringArray(data=order))
        if is_string
        else s(long_data=schema_pb2.LongArray(data=order))
    )

    def column(name: str) -> list[Any]:
        return [cell[name] for cell in cells]

    arrays = [s(long_data=schema_pb2.LongArray(data=tags)) for tags in column("tags")]
    docs = [json.dumps(doc).encode() for doc in column("doc")]
    field = schema_pb2.FieldData
    return milvus_pb2.QueryResults(
        fields_data=[
            field(field_name="id", scalars=ids),
            field(field_name="f", scalars=s(float_data=_floats(column("f")))),
            field(field_name="n", scalars=s(long_data=schema_pb2.LongArray(data=column("n")))),
            field(field_name="s", scalars=s(string_data=schema_pb2.StringArray(data=column("s")))),
            field(field_name="doc", scalars=s(json_data=schema_pb2.JSONArray(data=docs))),
            field(field_name="tags", scalars=s(array_data=schema_pb2.ArrayArray(data=arrays))),
            field(
                field_name="maybe",
                scalars=s(long_data=schema_pb2.LongArray(data=[m or 0 for m in column("maybe")])),
                valid_data=[m is not None for m in column("maybe")],
            ),
            field(
                field_name="v",
                vectors=v(dim=2, float_vector=_floats([w for pair in column("v") for w in pair])),
            ),
            field(field_name="half", vectors=v(dim=2, float16_vector=b"".join(column("half")))),
            field(
                field_name="sparse",
                vectors=v(
                    sparse_float_vector=schema_pb2.SparseFloatArray(contents=column("sparse"))
                ),
            ),
        ]
    )


def _value(name: str, cell: Any) -> Any:
    return json.dumps(cell, sort_keys=True) if name == "doc" else cell


def _check(
    source: dict[Key, dict[str, Any]],
    sink: dict[Key, dict[str, Any]],
    shuffle: Any,
    is_string: bool,
) -> None:
    key = KeyField("id", is_string)
    pages: list[Rows] = []
    for page in (source, sink):
        order: list[Key] = list(page)
        shuffle.shuffle(order)
        pages.append(rows_of(_answer(page, order, is_string), key))
    found = compare(pages[0], pages[1], FIELDS)
    assert found.missing == sorted(source.keys() - sink.keys())
    assert found.extra == sorted(sink.keys() - source.keys())
    both = sorted(source.keys() & sink.keys())
    assert found.common == len(both)
    want = []
    for k in both:
        odd = [n for n in FIELDS if _value(n, source[k][n]) != _value(n, sink[k][n])]
        if odd:
            want.append((k, tuple(odd)))
    assert found.different == want
    for k in both:
        left, right = (list(map(p.key, range(len(p)))).index(k) for p in pages)
        same = k not in dict(want)
        assert (pages[0].digest(left) == pages[1].digest(right)) == same


@given(st.dictionaries(int_keys, rows), st.dictionaries(int_keys, rows), st.randoms(), st.data())
def test_int_pages(source: Any, sink: Any, shuffle: Any, data: st.DataObject) -> None:
    for key in data.draw(st.sets(st.sampled_from(sorted(source)))) if source else ():
        sink[key] = source[key]
    _check(source, sink, shuffle, is_string=False)


@given(st.dictionaries(str_keys, rows), st.dictionaries(str_keys, rows), st.randoms(), st.data())
def test_varchar_pages(source: Any, sink: Any, shuffle: Any, data: st.DataObject) -> None:
    for key in data.draw(st.sets(st.sampled_from(sorted(source)))) if source else ():
        sink[key] = source[key]
    _check(source, sink, shuffle, is_string=True)


@given(st.dictionaries(int_keys, rows, min_size=1), st.data())
def test_a_page_cut_at_a_key_keeps_the_rows_up_to_it(page: Any, data: st.DataObject) -> None:
    bound = data.draw(st.sampled_from(sorted(page)))
    key = KeyField("id", is_string=False)
    whole = rows_of(_answer(page, list(page), is_string=False), key)
    cut = whole.upto(bound)
    kept = {k: v for k, v in page.items() if k <= bound}
    again = rows_of(_answer(kept, list(kept), is_string=False), key)
    found = compare(cut, again, FIELDS)
    assert (found.common, found.missing, found.extra, found.different) == (len(kept), [], [], [])


def test_nulls_left_out_of_a_vector_column_keep_the_other_rows_in_place() -> None:
    def page(words: list[int], valid: list[bool]) -> Rows:
        answer = milvus_pb2.QueryResults(
            fields_data=[
                schema_pb2.FieldData(
                    field_name="id",
                    scalars=schema_pb2.ScalarField(long_data=schema_pb2.LongArray(data=[1, 2, 3])),
                ),
                schema_pb2.FieldData(
                    field_name="v",
                    valid_data=valid,
                    vectors=schema_pb2.VectorField(dim=1, float_vector=_floats(words)),
                ),
            ]
        )
        return rows_of(answer, KeyField("id", is_string=False))

    full = page([1, 2], [True, False, True])
    assert compare(full, page([1, 2], [True, False, True]), ["v"]).different == []
    assert compare(full, page([1, 3], [True, False, True]), ["v"]).different == [(3, ("v",))]
    moved = page([1, 2], [True, True, False])
    assert compare(full, moved, ["v"]).different == [(2, ("v",)), (3, ("v",))]


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (b'{"a": 1, "b": 2}', b'{"b":2,"a":1}', True),
        (b"1", b"1.0", True),
        (b"1", b"true", False),
        (b'{"a": [1]}', b'{"a": [true]}', False),
        (b"[1, 2]", b"[2, 1]", False),
        (b"9007199254740993", b"9007199254740992", False),
        (b"{}", b"null", False),
        (b"not json", b"not json", True),
        (b"not json", b"not jsoN", False),
        (b"\xff", b"\xfe", False),
    ],
)
def test_json_by_value(left: bytes, right: bytes, equal: bool) -> None:
    assert json_equal(left, right) is equal


def test_key_expressions() -> None:
    number, text = KeyField("id", is_string=False), KeyField("name", is_string=True)
    assert number.between(None, None) == f"id <= {INT64_MAX}"
    assert number.between(INT64_MIN, 5) == f"id > {INT64_MIN + 1} - 1 and id <= 5"
    assert number.any_of([INT64_MIN, -1]) == f"id in [{INT64_MIN + 1} - 1,-1]"
    assert text.between(None, None) == 'name >= ""'
    assert text.any_of(['a"b\\', "日"]) == r'name in ["a\"b\\","日"]'


def test_an_answer_that_is_not_rectangular_is_refused() -> None:
    answer = _answer({1: _any_row()}, [1], is_string=False)
    answer.fields_data[0].scalars.long_data.data.append(2)
    with pytest.raises(ValueError, match="cells for 2 rows"):
        rows_of(answer, KeyField("id", is_string=False))


def _any_row() -> dict[str, Any]:
    return {
        "f": 0, "n": 0, "s": "", "doc": None, "v": (0, 0), "tags": [], "half": bytes(4),
        "sparse": b"", "maybe": None,
    }  # fmt: skip


def test_no_rows() -> None:
    empty = rows_of(milvus_pb2.QueryResults(), KeyField("id", is_string=False))
    assert isinstance(empty.keys, np.ndarray)
    found = compare(empty, empty, FIELDS)
    assert (found.common, found.missing, found.extra) == (0, [], [])
