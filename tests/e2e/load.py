"""A mixed load on a real source: collections of every shape, inserts, upserts, deletes, some DDL.

Law: what it does is decided by its seed alone; how far it gets is decided by time.
"""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pymilvus import CollectionSchema, DataType, FieldSchema, MilvusClient

DIM = 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One collection: its fields, shards, and how keys look."""

    name: str
    fields: tuple[FieldSchema, ...]
    shards: int = 1
    dynamic: bool = False
    partitions: tuple[str, ...] = ()
    auto_id: bool = False
    plain_keys: bool = False
    """Text keys of letters and digits alone."""

    @property
    def key(self) -> FieldSchema:
        return next(f for f in self.fields if f.is_primary)

    @property
    def has_partition_key(self) -> bool:
        return any(f.is_partition_key for f in self.fields)


def _vector(name: str = "vector", dim: int = DIM) -> FieldSchema:
    return FieldSchema(name, DataType.FLOAT_VECTOR, dim=dim)


SHAPES = (
    Shape(
        "int_keys",
        (FieldSchema("id", DataType.INT64, is_primary=True), _vector()),
        shards=2,
        partitions=("p1", "my_default_x"),
    ),
    Shape(
        "text_keys",
        (
            FieldSchema("name", DataType.VARCHAR, is_primary=True, max_length=200),
            FieldSchema("note", DataType.VARCHAR, max_length=200),
            _vector(),
        ),
        shards=3,
        dynamic=True,
    ),
    Shape(
        "all_scalars",
        (
            FieldSchema("id", DataType.INT64, is_primary=True),
            FieldSchema("flag", DataType.BOOL),
            FieldSchema("tiny", DataType.INT8),
            FieldSchema("small", DataType.INT16),
            FieldSchema("medium", DataType.INT32),
            FieldSchema("large", DataType.INT64),
            FieldSchema("single", DataType.FLOAT),
            FieldSchema("double", DataType.DOUBLE),
            FieldSchema("text", DataType.VARCHAR, max_length=300),
            FieldSchema("json", DataType.JSON),
            FieldSchema("numbers", DataType.ARRAY, element_type=DataType.INT64, max_capacity=8),
            FieldSchema(
                "words",
                DataType.ARRAY,
                element_type=DataType.VARCHAR,
                max_capacity=8,
                max_length=40,
            ),
            _vector(),
        ),
    ),
    Shape(
        "tenants",
        (
            FieldSchema("id", DataType.INT64, is_primary=True),
            FieldSchema("tenant", DataType.VARCHAR, is_partition_key=True, max_length=40),
            _vector(),
        ),
        shards=2,
        dynamic=True,
    ),
    Shape(
        "binary",
        (
            FieldSchema("id", DataType.INT64, is_primary=True),
            FieldSchema("bits", DataType.BINARY_VECTOR, dim=64),
        ),
    ),
    Shape(
        "auto",
        (FieldSchema("id", DataType.INT64, is_primary=True, auto_id=True), _vector()),
        auto_id=True,
    ),
)

_ALPHABET = "abc äöü ß 漢字 \\ \" ' \n\t % {} \u2028é"


@dataclass
class Load:
    """Drives one database of the source until `stop()`; counts what the source acknowledged."""

    uri: str
    database: str
    seed: int = 0
    shapes: tuple[Shape, ...] = SHAPES
    pause_seconds: float = 0.01
    rows_per_call: tuple[int, int] = (1, 60)
    rows_max: int = 12_000
    """Of a collection: one query of Milvus gives 16,384."""
    acknowledged: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._drives: dict[str, tuple[random.Random, list[Any], list[int]]] = {}
        """Of each collection: chance, the keys that live, how many calls there were."""

    def create(self) -> None:
        if self.database != "default":
            client = MilvusClient(uri=self.uri)
            client.create_database(self.database)
            client.close()
        client = MilvusClient(uri=self.uri, db_name=self.database)
        for shape in self.shapes:
            create_collection(client, shape)
        client.close()

    def start(self) -> None:
        """Goes on where it was stopped."""
        self._stop.clear()
        for index, shape in enumerate(self.shapes):
            rng = random.Random(f"{self.seed}/{index}")
            self._drives.setdefault(shape.name, (rng, [], [0]))
            thread = threading.Thread(target=self._drive, args=(shape,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Ends it, and raises what went wrong at the source."""
        self._stop.set()
        while self._threads:
            self._threads.pop().join()
        if self.errors:
            raise self.errors[0]

    def _drive(self, shape: Shape) -> None:
        client = MilvusClient(uri=self.uri, db_name=self.database)
        rng, known, steps = self._drives[shape.name]
        try:
            while not self._stop.is_set():
                steps[0] += 1
                self._one_call(client, shape, rng, known, steps[0])
                self._stop.wait(self.pause_seconds)
        except BaseException as error:
            self.errors.append(error)
        finally:
            client.close()

    def _one_call(
        self, client: MilvusClient, shape: Shape, rng: random.Random, known: list[Any], step: int
    ) -> None:
        count = rng.randint(*self.rows_per_call)
        partition = (
            {"partition_name": rng.choice(("_default", *shape.partitions))}
            if shape.partitions
            else {}
        )
        choice = rng.random()
        full = len(known) >= self.rows_max
        if shape.auto_id:
            if (choice < 0.8 and not full) or not known:
                rows = [make_row(shape, rng, None) for _ in range(count)]
                known.extend(client.insert(shape.name, rows)["ids"])
            else:
                self._delete(client, shape, rng, known)
        elif (choice < 0.5 and not full) or len(known) < 10:
            # A key is inserted once while it lives: the source itself does not look for doubles.
            keys = [new_key(shape, rng, step, n) for n in range(count)]
            client.insert(shape.name, [make_row(shape, rng, key) for key in keys], **partition)
            known.extend((key, partition.get("partition_name")) for key in keys)
        elif choice < 0.75:
            # Upsert into another partition would leave the old row at the source.
            sample = rng.sample(known, min(count, len(known)))
            where = sample[0][1]
            keys = [key for key, place in sample if place == where]
            named = {"partition_name": where} if where else {}
            self._upsert(client, shape.name, [make_row(shape, rng, key) for key in keys], named)
        else:
            self._delete(client, shape, rng, known)
            count = 0
        self.acknowledged += count

    def _upsert(
        self, client: MilvusClient, name: str, rows: list[Any], partition: dict[str, Any]
    ) -> None:
        client.upsert(name, rows, **partition)

    def _delete(
        self, client: MilvusClient, shape: Shape, rng: random.Random, known: list[Any]
    ) -> None:
        gone = rng.sample(range(len(known)), min(rng.randint(1, 20), len(known)))
        keys = [known[index] for index in gone]
        delete_keys(client, shape.name, shape, [key if shape.auto_id else key[0] for key in keys])
        for index in sorted(gone, reverse=True):
            known.pop(index)


def delete_keys(client: MilvusClient, collection: str, shape: Shape, keys: list[Any]) -> None:
    # pymilvus' own quoting of `ids` breaks on quotes inside of text.
    wanted = json.dumps(keys, ensure_ascii=False)
    client.delete(collection, filter=f"{shape.key.name} in {wanted}")


def create_collection(client: MilvusClient, shape: Shape) -> None:
    """With its partitions, an index on every vector, loaded."""
    schema = CollectionSchema(
        list(shape.fields), enable_dynamic_field=shape.dynamic, auto_id=shape.auto_id
    )
    client.create_collection(shape.name, schema=schema, num_shards=shape.shards)
    for partition in shape.partitions:
        client.create_partition(shape.name, partition)
    make_readable(client, shape)


def make_readable(client: MilvusClient, shape: Shape) -> None:
    """An index on every vector, and loaded."""
    params = client.prepare_index_params()
    for f in shape.fields:
        if f.dtype == DataType.FLOAT_VECTOR:
            params.add_index(f.name, index_type="FLAT", metric_type="L2")
        elif f.dtype == DataType.BINARY_VECTOR:
            params.add_index(f.name, index_type="BIN_FLAT", metric_type="HAMMING")
    client.create_index(shape.name, params)
    client.load_collection(shape.name)


def new_key(shape: Shape, rng: random.Random, step: int, n: int) -> int | str:
    if shape.key.dtype == DataType.VARCHAR:
        letters = "abcäß漢" if shape.plain_keys else _ALPHABET
        text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 20)))
        return f"{text}{step}-{n}"
    number = step * 1_000 + n
    return -number if rng.random() < 0.3 else number


def make_row(shape: Shape, rng: random.Random, key: int | str | None) -> Row:
    row: Row = {} if key is None else {shape.key.name: key}
    for f in shape.fields:
        if not f.is_primary:
            row[f.name] = _value(f, rng)
    if shape.dynamic and rng.random() < 0.7:
        row["color"] = rng.choice(["red", "grün", "青"])
        row["nested"] = {"a": [1, 2.5, None], "b": rng.random()}
    return row


def _value(f: FieldSchema, rng: random.Random) -> Any:
    match f.dtype:
        case DataType.FLOAT_VECTOR:
            return (
                np.random.default_rng(rng.getrandbits(32)).random(f.dim, dtype=np.float32).tolist()
            )
        case DataType.BINARY_VECTOR:
            return rng.randbytes(f.dim // 8)
        case DataType.BOOL:
            return rng.random() < 0.5
        case DataType.INT8:
            return rng.randint(-128, 127)
        case DataType.INT16:
            return rng.randint(-(2**15), 2**15 - 1)
        case DataType.INT32:
            return rng.randint(-(2**31), 2**31 - 1)
        case DataType.INT64:
            return rng.randint(-(2**63), 2**63 - 1)
        case DataType.FLOAT:
            return float(np.float32(rng.uniform(-1e6, 1e6)))
        case DataType.DOUBLE:
            return rng.uniform(-1e12, 1e12)
        case DataType.JSON:
            return {"k": rng.randint(0, 9), "list": [1, "x", None, {"deep": rng.random()}]}
        case DataType.ARRAY if f.element_type == DataType.INT64:
            return [rng.randint(-9, 9) for _ in range(rng.randint(0, 8))]
        case DataType.ARRAY:
            return [rng.choice(_ALPHABET) for _ in range(rng.randint(0, 8))]
        case _:
            if f.is_partition_key:
                return f"tenant-{rng.randint(0, 20)}"
            return "".join(rng.choice(_ALPHABET) for _ in range(rng.randint(0, 30)))
