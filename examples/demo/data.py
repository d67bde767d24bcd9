"""What the demo writes: the handwritten digits that scikit-learn ships, and generated rows.

Laws: the same run of rows is made again in the same way; no two vectors of the digits are equal,
because equal distances would leave the order of neighbours open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from pymilvus import CollectionSchema, DataType, FieldSchema
from sklearn.datasets import load_digits

Row = dict[str, Any]

PIXELS = 64
IMAGES = 1_797


@dataclass(frozen=True, slots=True)
class Table:
    """One collection of the source and how to make its rows."""

    database: str
    name: str
    schema: CollectionSchema
    key: str
    vector: str
    metric: str
    rows: Callable[[int, int], list[Row]]
    """(first row number, how many): a row's key follows from its number alone."""
    key_of: Callable[[int], int | str]
    changed: Callable[[Row], Row]
    """The same row as an upsert brings it: the same key, other contents."""
    shards: int = 1
    partition_of: Callable[[Row], str] | None = None
    """None: the default partition, or what the partition key says."""
    partitions: tuple[str, ...] = field(default=())

    @property
    def full_name(self) -> str:
        return f"{self.database}.{self.name}"

    @property
    def index(self) -> dict[str, Any]:
        """Exact search: the same rows have the same neighbours, whatever the segments."""
        kind = "BIN_FLAT" if self.metric == "HAMMING" else "FLAT"
        return {"index_type": kind, "metric_type": self.metric, "params": {}}


def digits() -> Table:
    """The busiest one: Int64 keys, two shards."""
    schema = CollectionSchema(
        [
            FieldSchema("image", DataType.INT64, is_primary=True),
            FieldSchema("digit", DataType.INT8),
            FieldSchema("copy", DataType.INT16),
            FieldSchema("pixels", DataType.FLOAT_VECTOR, dim=PIXELS),
        ],
        description="handwritten digits, 8 x 8 pixels",
    )

    def rows(first: int, count: int) -> list[Row]:
        numbers = range(first, first + count)
        return [
            {
                "image": n,
                "digit": int(_labels()[n % IMAGES]),
                "copy": n // IMAGES,
                "pixels": vector,
            }
            for n, vector in zip(numbers, _pixels(numbers), strict=True)
        ]

    def changed(row: Row) -> Row:
        brighter = (np.asarray(row["pixels"], np.float32) * np.float32(1.0625)).tolist()
        return {**row, "copy": row["copy"] + 1_000, "pixels": brighter}

    return Table(
        "default", "digits", schema, "image", "pixels", "L2", rows, lambda n: n, changed, shards=2
    )


def digits_by_name() -> Table:
    """VarChar keys, a JSON field and fields that no schema names."""
    schema = CollectionSchema(
        [
            FieldSchema("name", DataType.VARCHAR, is_primary=True, max_length=64),
            FieldSchema("about", DataType.JSON),
            FieldSchema("pixels", DataType.FLOAT_VECTOR, dim=PIXELS),
        ],
        enable_dynamic_field=True,
    )

    def key_of(number: int) -> str:
        return f"digit “{_labels()[number % IMAGES]}” № {number:06d}"

    def rows(first: int, count: int) -> list[Row]:
        numbers = range(first, first + count)
        return [
            {
                "name": key_of(n),
                "about": {"ink": float(sum(vector)), "quarters": [sum(vector[:32]), n % 4]},
                "pixels": vector,
                "writer": f"person {n % 43}",
                **({"remark": "clear"} if n % 3 == 0 else {"page": n // 50}),
            }
            for n, vector in zip(numbers, _pixels(numbers), strict=True)
        ]

    def changed(row: Row) -> Row:
        return {**row, "about": {"seen": "again", **row["about"]}, "remark": "corrected"}

    return Table("default", "digits_by_name", schema, "name", "pixels", "IP", rows, key_of, changed)


def prints() -> Table:
    """The digits in black and white: binary vectors."""
    schema = CollectionSchema(
        [
            FieldSchema("image", DataType.INT64, is_primary=True),
            FieldSchema("digit", DataType.INT32),
            FieldSchema("bits", DataType.BINARY_VECTOR, dim=PIXELS),
        ]
    )

    def rows(first: int, count: int) -> list[Row]:
        return [
            {
                "image": -n - 1,
                "digit": int(_labels()[n % IMAGES]),
                "bits": np.packbits(_images()[n % IMAGES] > 4 + n // IMAGES % 8).tobytes(),
            }
            for n in range(first, first + count)
        ]

    return Table(
        *("shop", "prints", schema, "image", "bits", "HAMMING"),
        rows,
        lambda n: -n - 1,
        lambda row: {**row, "digit": row["digit"] + 10},
    )


def products() -> Table:
    """A partition key, arrays, all the plain types."""
    schema = CollectionSchema(
        [
            FieldSchema("id", DataType.INT64, is_primary=True),
            FieldSchema("tenant", DataType.VARCHAR, max_length=32, is_partition_key=True),
            FieldSchema("price", DataType.DOUBLE),
            FieldSchema("weight", DataType.FLOAT),
            FieldSchema("in_stock", DataType.BOOL),
            FieldSchema(
                "tags", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=8, max_length=32
            ),
            FieldSchema("embedding", DataType.FLOAT_VECTOR, dim=32),
        ],
        num_partitions=7,
    )

    def rows(first: int, count: int) -> list[Row]:
        random = np.random.default_rng(first)
        vectors = random.random((count, 32), np.float32)
        return [
            {
                "id": n * 7_919,
                "tenant": f"tenant-{n % 11}",
                "price": n / 7,
                "weight": float(np.float32(n / 3)),
                "in_stock": n % 5 != 0,
                "tags": ["new", "größe L", f"shelf {n % 9}"][: n % 4],
                "embedding": vector.tolist(),
            }
            for n, vector in zip(range(first, first + count), vectors, strict=True)
        ]

    return Table(
        *("shop", "products", schema, "id", "embedding", "L2"),
        rows,
        lambda n: n * 7_919,
        lambda row: {**row, "price": row["price"] * 0.9, "in_stock": False, "tags": ["sale"]},
    )


def events() -> Table:
    """Generated rows in named partitions, one of which is created while the stream runs."""
    schema = CollectionSchema(
        [
            FieldSchema("event", DataType.INT64, is_primary=True),
            FieldSchema("level", DataType.INT16),
            FieldSchema("body", DataType.JSON),
            FieldSchema("embedding", DataType.FLOAT_VECTOR, dim=16),
        ],
        enable_dynamic_field=True,
    )

    def rows(first: int, count: int) -> list[Row]:
        random = np.random.default_rng(first + 1_000_000)
        vectors = random.standard_normal((count, 16), np.float32)
        return [
            {
                "event": n,
                "level": n % 7 - 3,
                "body": {"from": {"page": f"/p/{n % 101}"}, "ms": n % 997 / 8, "ok": n % 2 == 0},
                "embedding": vector.tolist(),
                "browser": "Firefox" if n % 2 else "Safari",
            }
            for n, vector in zip(range(first, first + count), vectors, strict=True)
        ]

    return Table(
        *("shop", "events", schema, "event", "embedding", "L2"),
        rows,
        lambda n: n,
        lambda row: {**row, "level": 9, "body": {"corrected": True}},
        partition_of=lambda row: "web" if row["event"] < LATE_EVENTS else "app",
        partitions=("web",),
    )


LATE_EVENTS = 1_000_000
"""Events from this number on go to the partition `app`."""


def sessions(dim: int) -> Table:
    """Dropped and created again under the same name, with another dimension and other fields."""
    extra = [FieldSchema("second_life", DataType.BOOL)] if dim > 8 else []
    schema = CollectionSchema(
        [
            FieldSchema("user", DataType.VARCHAR, is_primary=True, max_length=64),
            FieldSchema("last", DataType.FLOAT_VECTOR, dim=dim),
            *extra,
        ]
    )

    def rows(first: int, count: int) -> list[Row]:
        random = np.random.default_rng(first + dim * 10_000_000)
        vectors = random.random((count, dim), np.float32)
        return [
            {
                "user": f"user {n}",
                "last": vector.tolist(),
                **({"second_life": True} if extra else {}),
            }
            for n, vector in zip(range(first, first + count), vectors, strict=True)
        ]

    def changed(row: Row) -> Row:
        return {**row, "last": row["last"][::-1]}

    return Table(
        *("shop", "sessions", schema, "user", "last", "L2"), rows, lambda n: f"user {n}", changed
    )


def scratch() -> Table:
    """Excluded by the task: it must not appear at the sink."""
    table = sessions(8)
    return Table(
        *("default", "scratch_notes", table.schema, table.key, table.vector, table.metric),
        table.rows,
        table.key_of,
        table.changed,
    )


@cache
def _images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(load_digits().data, np.float32)


@cache
def _labels() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(load_digits().target, np.int64)


def _pixels(numbers: range) -> list[list[float]]:
    """The first 1,797 as they are, each further copy with a little noise of its own."""
    images = _images()[[n % IMAGES for n in numbers]]
    noise = np.stack(
        [
            np.random.default_rng(n).random(PIXELS, np.float32) * np.float32(n >= IMAGES)
            for n in numbers
        ]
    )
    result: list[list[float]] = (images + noise).tolist()
    return result
