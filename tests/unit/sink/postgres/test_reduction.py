"""What a batch comes to, against its changes one by one; U+0000 taken out; words of errors."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.errors import RetryableError, RowRefusedError, UnknownOutcomeError, UserError
from milvus_cdc.rows import ChangeOp, Changes
from milvus_cdc.sink.postgres import failures
from milvus_cdc.sink.postgres.reduction import reduce
from milvus_cdc.sink.postgres.texts import without_constants, without_nul, without_nul_json

from tests.contract.postgres_samples import BEGIN, KEY, NUMBER, gone, put, table_of

TABLE = table_of(KEY, NUMBER)

STEPS = st.lists(
    st.tuples(
        st.sampled_from((ChangeOp.CREATE, ChangeOp.UPDATE, ChangeOp.DELETE)),
        st.sampled_from(("", "p", "q")),
        st.lists(st.integers(0, 5), max_size=4),
    ),
    max_size=12,
)


@given(STEPS, st.dictionaries(st.integers(0, 5), st.sampled_from(("p", "q", ""))))
def test_a_batch_has_the_effect_of_its_changes(steps: list[Any], before: dict[int, str]) -> None:
    """Upon whatever the table holds."""
    changes: list[Changes] = []
    model: dict[int, tuple[str, int]] = {key: (part, 0) for key, part in before.items()}
    for at, (op, partition, keys) in enumerate(steps, start=1):
        if op is ChangeOp.DELETE:
            changes.append(gone(keys, at=at, partition=partition))
            for key in keys:
                if key in model and partition in ("", model[key][0]):
                    del model[key]
        else:
            rows = [{"id": key, "n": at * 100 + i} for i, key in enumerate(keys)]
            changes.append(put(TABLE, rows, op=op, at=at, partition=partition))
            model |= {key: (partition, at * 100 + i) for i, key in enumerate(keys)}
    reduced = reduce(TABLE, changes)
    table = {key: (part, 0) for key, part in before.items()}
    for partition, doomed in reduced.deletes.items():
        for key in doomed.to_pylist():
            if key in table and partition in ("", table[key][0]):
                del table[key]
    rows = reduced.rows.to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["_ts"] == BEGIN + row["n"] // 100
        table[row["id"]] = (row["_partition"], row["n"])
    assert table == model
    if reduced.fresh and rows:
        assert all(op is ChangeOp.CREATE for op, _, keys in steps if keys and op != "DELETE")


def test_fresh_rows_are_told() -> None:
    create, update = put(TABLE, [{"id": 1, "n": 1}]), gone([2])
    assert reduce(TABLE, [create, update]).fresh
    assert not reduce(TABLE, [create, create]).fresh
    assert not reduce(TABLE, [gone([1]), create]).fresh
    assert reduce(TABLE, []).rows.num_rows == 0


@given(st.lists(st.sampled_from('\0ab\\"/nu0\n'), max_size=12).map("".join))
def test_nul_leaves_json_text(text: str) -> None:
    """As if the value had never had it."""
    whole = {"k" + text: [text, {"x": text}]}
    clean = text.replace("\0", "")
    array = pa.array([json.dumps(whole), "{}", json.dumps(text)])
    assert [json.loads(x) for x in without_nul_json(array).to_pylist()] == [
        {"k" + clean: [clean, {"x": clean}]},
        {},
        clean,
    ]
    assert without_nul(pa.array([text, "b"])).to_pylist() == [clean, "b"]


def test_constants_become_strings() -> None:
    text = '{"NaN": [NaN, -Infinity, "a\\"NaN", Infinity], "x": "-Infinity"}'
    [found, plain] = without_constants(pa.array([text, '{"a": 1.50}'])).to_pylist()
    expected = {"NaN": ["NaN", "-Infinity", 'a"NaN', "Infinity"], "x": "-Infinity"}
    assert json.loads(found, parse_constant=pytest.fail) == expected
    assert plain == '{"a": 1.50}'


def _error(code: str) -> psycopg.Error:
    kind: type[psycopg.Error] = type(
        "E", (psycopg.Error,), {"sqlstate": code, "__str__": lambda self: "words"}
    )
    return kind()


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        ("40001", RetryableError, "SINK_ERROR"),
        ("40P01", RetryableError, "SINK_ERROR"),
        ("53100", RetryableError, "SINK_DISK_FULL"),
        ("53200", RetryableError, "SINK_ERROR"),
        ("53300", RetryableError, "SINK_ERROR"),
        ("58030", RetryableError, "SINK_ERROR"),
        ("57014", RetryableError, "SINK_TIMEOUT"),
        ("55P03", RetryableError, "SINK_TIMEOUT"),
        ("25006", RetryableError, "SINK_READ_ONLY"),
        ("57P01", RetryableError, "SINK_CONNECTION_LOST"),
        ("08006", RetryableError, "SINK_CONNECTION_LOST"),
        ("42501", UserError, "SINK_ACCESS_DENIED"),
        ("42P01", UserError, "SINK_COLLECTION_MISSING"),
        ("42703", UserError, "SCHEMA_MISMATCH"),
        ("22021", RowRefusedError, "ROW_NOT_STORABLE"),
        ("23514", RowRefusedError, "ROW_NOT_STORABLE"),
        ("XX000", UserError, "SINK_REFUSED"),
    ],
)
def test_codes(code: str, kind: type[Exception], reason: str) -> None:
    for committing in (False, True):
        found = failures.of_statement(_error(code), "writing db.c", committing=committing)
        lost = reason == "SINK_CONNECTION_LOST"
        assert type(found) is (UnknownOutcomeError if lost and committing else kind)
        assert found.reason == reason
        assert "writing db.c: words" in found.message
