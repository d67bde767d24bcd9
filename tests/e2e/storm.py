"""A seeded storm over a real source: every kind of operation at random, mixed with rows.

Laws: the seed alone decides what is done (automatic keys aside); the model here holds what the
source was told and never looks at a sink; an operation that the source refuses is an error of the
storm, not of replication.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pymilvus import CollectionSchema, DataType, MilvusClient
from pymilvus.client.cache import GlobalCache

from tests.e2e.load import SHAPES, Shape, delete_keys, make_row, new_key

COLLECTIONS_MAX = 30
NAMES_PER_DATABASE = 14
LOADED_MAX = 8
"""More would be slow on a small machine."""
KEYS_IN_MODEL_MAX = 400

ROOT_TOKEN = "root:Milvus"
"""Milvus' default."""

_VECTOR_INDEXES: tuple[dict[str, Any], ...] = (
    {"index_type": "FLAT", "metric_type": "L2"},
    {"index_type": "FLAT", "metric_type": "IP"},
    {"index_type": "IVF_FLAT", "metric_type": "L2", "params": {"nlist": 8}},
    {"index_type": "HNSW", "metric_type": "COSINE", "params": {"M": 8, "efConstruction": 16}},
)
_BINARY_INDEXES: tuple[dict[str, Any], ...] = (
    {"index_type": "BIN_FLAT", "metric_type": "HAMMING"},
    {"index_type": "BIN_FLAT", "metric_type": "JACCARD"},
)
_SCALAR_INDEXES = {DataType.VARCHAR: "Trie", DataType.INT64: "STL_SORT"}
_PRIVILEGES = ("Insert", "Delete", "Search", "Query", "Flush", "GetLoadState")


@dataclass(eq=False)
class Living:
    """One collection of the source, as the storm left it."""

    shape: Shape
    database: str
    name: str
    partitions: set[str]
    indexes: dict[str, str] = field(default_factory=dict)
    """Index name -> field."""
    loaded: set[str] = field(default_factory=set)
    """Partitions; all of them when the collection is."""
    wholly: bool = False
    aliases: set[str] = field(default_factory=set)
    keys: list[tuple[Any, str | None]] = field(default_factory=list)
    """(key, partition) of some living rows."""

    @property
    def vectors_indexed(self) -> bool:
        vectors = {f.name for f in self.shape.fields if f.dtype in _VECTOR_TYPES}
        return vectors <= set(self.indexes.values())


_VECTOR_TYPES = (DataType.FLOAT_VECTOR, DataType.BINARY_VECTOR)


class Storm:
    """`step()` does one operation and says what it was."""

    def __init__(self, uri: str, prefix: str, seed: int, *, rbac: bool = True) -> None:
        self.uri = uri
        self.prefix = prefix
        self.rng = random.Random(f"storm {seed}")
        self.databases = [f"{prefix}_{letter}" for letter in "abc"]
        self.extra = f"{prefix}_extra"
        """Comes and goes."""
        self.role_prefix = f"{prefix}_role"
        self.living: list[Living] = []
        self.done: list[str] = []
        self._extra_there = False
        self._aliases: dict[tuple[str, str], Living] = {}
        self._roles: dict[str, set[tuple[str, str, str]]] = {}
        """Role -> (database, object, privilege)."""
        self._clients: dict[str, MilvusClient] = {}
        self._count = 0
        weights: list[tuple[int, Callable[[], str | None]]] = [
            (60, self._rows),
            (8, self._create_collection),
            (3, self._drop_collection),
            (5, self._rename),
            (2, self._swap),
            (5, self._create_partition),
            (3, self._drop_partition),
            (5, self._create_alias),
            (4, self._alter_alias),
            (3, self._drop_alias),
            (5, self._create_index),
            (2, self._drop_index),
            (4, self._load),
            (3, self._release),
            (3, self._properties),
            (2, self._flush),
            (2, self._database),
        ]
        if rbac:
            weights.append((4, self._role))
        self._weights = [weight for weight, _ in weights]
        self._operations = [operation for _, operation in weights]

    def begin(self) -> None:
        for database in self.databases:
            self._root().create_database(database)
        for _ in range(6):
            self._say(self._create_collection())

    def step(self) -> str:
        """One operation that is possible now."""
        while True:
            (operation,) = self.rng.choices(self._operations, self._weights)
            GlobalCache.schema.clear()
            said = operation()
            if said is not None:
                return self._say(said)

    def load_everything(self) -> None:
        """So that every row can be compared: an index on every vector, and everything loaded."""
        GlobalCache.schema.clear()
        for each in self.living:
            while not each.vectors_indexed:
                self._index_a_vector(each)
            if each.loaded != each.partitions or not each.wholly:
                client = self._client(each.database)
                if each.loaded:
                    client.release_collection(each.name)
                client.load_collection(each.name)
                each.loaded, each.wholly = set(each.partitions), True

    def end(self) -> None:
        """Takes down everything at the source."""
        GlobalCache.schema.clear()
        for (database, alias), _ in self._aliases.items():
            self._client(database).drop_alias(alias)
        for each in self.living:
            self._client(each.database).drop_collection(each.name)
        for database in [*self.databases, *([self.extra] if self._extra_there else [])]:
            self._root().drop_database(database)
        for role, grants in self._roles.items():
            for database, object_name, privilege in sorted(grants):
                self._root().revoke_privilege(
                    role, "Collection", privilege, object_name, db_name=database
                )
            self._root().drop_role(role)
        self.close()

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    # ---- rows

    def _rows(self) -> str | None:
        each = self._one(lambda c: True)
        if each is None:
            return None
        client, rng, shape = self._client(each.database), self.rng, each.shape
        self._count += 1
        number = rng.randint(1, 40)
        choice = rng.random()
        known = each.keys
        if shape.auto_id and choice < 0.7:
            answer = client.insert(each.name, [make_row(shape, rng, None) for _ in range(number)])
            known.extend((key, None) for key in answer["ids"])
            said = f"insert {number}"
        elif not shape.auto_id and (choice < 0.5 or len(known) < 10):
            partition = None
            if not shape.has_partition_key:
                partition = rng.choice(sorted(each.partitions))
            keys = [new_key(shape, rng, self._count, n) for n in range(number)]
            named = {"partition_name": partition} if partition else {}
            client.insert(each.name, [make_row(shape, rng, key) for key in keys], **named)
            known.extend((key, partition) for key in keys)
            said = f"insert {number} into {partition}"
        elif not shape.auto_id and choice < 0.75:
            sample = rng.sample(known, min(number, len(known)))
            partition = sample[0][1]
            keys = [key for key, where in sample if where == partition]
            named = {"partition_name": partition} if partition else {}
            client.upsert(each.name, [make_row(shape, rng, key) for key in keys], **named)
            said = f"upsert {len(keys)} in {partition}"
        elif known:
            gone = rng.sample(known, min(rng.randint(1, 20), len(known)))
            delete_keys(client, each.name, shape, [key for key, _ in gone])
            each.keys = [entry for entry in known if entry not in gone]
            said = f"delete {len(gone)}"
        else:
            return None
        if len(each.keys) > KEYS_IN_MODEL_MAX:
            each.keys = rng.sample(each.keys, KEYS_IN_MODEL_MAX)
        return f"{each.database}.{each.name}: {said}"

    # ---- collections and names

    def _create_collection(self) -> str | None:
        if len(self.living) >= COLLECTIONS_MAX:
            return None
        database = self.rng.choice(self._all_databases())
        name = self._free_name(database)
        shape = self.rng.choice(SHAPES)
        if name is None:
            return None
        client = self._client(database)
        schema = CollectionSchema(
            list(shape.fields),
            description=self.rng.choice(["", "of the storm", "größer"]),
            enable_dynamic_field=shape.dynamic,
            auto_id=shape.auto_id,
        )
        level = self.rng.choice(["Strong", "Bounded", "Eventually"])
        client.create_collection(
            name, schema=schema, num_shards=shape.shards, consistency_level=level
        )
        partitions = {"_default"}
        if shape.has_partition_key:
            partitions = set(client.list_partitions(name))
        each = Living(shape, database, name, partitions)
        self.living.append(each)
        if self.rng.random() < 0.7:
            self._index_a_vector(each)
            if self._loaded() < LOADED_MAX:
                client.load_collection(name)
                each.loaded, each.wholly = set(partitions), True
        return f"create collection {database}.{name} like {shape.name}, loaded {each.wholly}"

    def _drop_collection(self) -> str | None:
        each = self._one(lambda c: not c.aliases)
        if each is None or len(self.living) < 5:
            return None
        self._client(each.database).drop_collection(each.name)
        self.living.remove(each)
        return f"drop collection {each.database}.{each.name}"

    def _rename(self) -> str | None:
        each = self._one(lambda c: True)
        if each is None:
            return None
        database = each.database
        if not each.aliases and self.rng.random() < 0.3:
            database = self.rng.choice(self._all_databases())
        name = self._free_name(database)
        return None if name is None else self._move(each, database, name)

    def _swap(self) -> str | None:
        one = self._one(lambda c: True)
        other = self._one(lambda c: c is not one and one is not None and c.database == one.database)
        if one is None or other is None:
            return None
        first, second = one.name, other.name
        said = [
            self._move(one, one.database, "between_two"),
            self._move(other, other.database, first),
            self._move(one, one.database, second),
        ]
        return "; ".join(said)

    def _move(self, each: Living, database: str, name: str) -> str:
        said = f"rename {each.database}.{each.name} to {database}.{name}"
        self._client(each.database).rename_collection(each.name, name, database)
        GlobalCache.schema.clear()
        each.database, each.name = database, name
        return said

    def _database(self) -> str | None:
        if not self._extra_there:
            self._root().create_database(self.extra)
            self._extra_there = True
            return f"create database {self.extra}"
        if any(each.database == self.extra for each in self.living):
            return None
        if client := self._clients.pop(self.extra, None):
            client.close()
        self._root().drop_database(self.extra)
        self._extra_there = False
        return f"drop database {self.extra}"

    # ---- partitions

    def _create_partition(self) -> str | None:
        each = self._one(lambda c: not c.shape.has_partition_key and len(c.partitions) < 6)
        if each is None:
            return None
        free = sorted({f"p{n}" for n in range(8)} - each.partitions)
        partition = self.rng.choice(free)
        self._client(each.database).create_partition(each.name, partition)
        each.partitions.add(partition)
        if each.wholly:
            each.loaded.add(partition)
        return f"{each.database}.{each.name}: create partition {partition}"

    def _drop_partition(self) -> str | None:
        each = self._one(lambda c: not c.shape.has_partition_key and len(c.partitions) > 1)
        if each is None:
            return None
        partition = self.rng.choice(sorted(each.partitions - {"_default"}))
        client = self._client(each.database)
        if partition in each.loaded:
            client.release_partitions(each.name, [partition])
            each.loaded.discard(partition)
        client.drop_partition(each.name, partition)
        each.partitions.discard(partition)
        each.keys = [entry for entry in each.keys if entry[1] != partition]
        return f"{each.database}.{each.name}: drop partition {partition}"

    # ---- aliases

    def _create_alias(self) -> str | None:
        each = self._one(lambda c: len(c.aliases) < 3)
        name = None if each is None else self._free_name(each.database)
        if each is None or name is None:
            return None
        self._client(each.database).create_alias(each.name, name)
        each.aliases.add(name)
        self._aliases[each.database, name] = each
        return f"create alias {each.database}.{name} of {each.name}"

    def _alter_alias(self) -> str | None:
        if not self._aliases:
            return None
        database, alias = self.rng.choice(sorted(self._aliases))
        now = self._aliases[database, alias]
        each = self._one(lambda c: c is not now and c.database == database)
        if each is None:
            return None
        self._client(database).alter_alias(each.name, alias)
        now.aliases.discard(alias)
        each.aliases.add(alias)
        self._aliases[database, alias] = each
        return f"alter alias {database}.{alias} from {now.name} to {each.name}"

    def _drop_alias(self) -> str | None:
        if not self._aliases:
            return None
        database, alias = self.rng.choice(sorted(self._aliases))
        self._client(database).drop_alias(alias)
        self._aliases.pop((database, alias)).aliases.discard(alias)
        return f"drop alias {database}.{alias}"

    # ---- indexes and load state

    def _create_index(self) -> str | None:
        each = self._one(lambda c: not c.loaded)
        if each is None:
            return None
        if not each.vectors_indexed:
            return self._index_a_vector(each)
        for candidate in each.shape.fields:
            kind = _SCALAR_INDEXES.get(candidate.dtype)
            if kind and not candidate.is_primary and candidate.name not in each.indexes.values():
                return self._index(each, candidate.name, {"index_type": kind})
        return None

    def _index_a_vector(self, each: Living) -> str:
        taken = set(each.indexes.values())
        vector = next(
            f for f in each.shape.fields if f.dtype in _VECTOR_TYPES and f.name not in taken
        )
        binary = vector.dtype == DataType.BINARY_VECTOR
        return self._index(
            each, vector.name, self.rng.choice(_BINARY_INDEXES if binary else _VECTOR_INDEXES)
        )

    def _index(self, each: Living, on: str, wish: dict[str, Any]) -> str:
        client = self._client(each.database)
        name = self.rng.choice([on, f"by_{on}", f"idx{self.rng.randint(0, 9)}_{on}"])
        params = client.prepare_index_params()
        params.add_index(on, index_name=name, **wish)
        client.create_index(each.name, params)
        each.indexes[name] = on
        return f"{each.database}.{each.name}: create index {name} on {on}: {wish}"

    def _drop_index(self) -> str | None:
        each = self._one(lambda c: bool(c.indexes) and not c.loaded)
        if each is None:
            return None
        name = self.rng.choice(sorted(each.indexes))
        self._client(each.database).drop_index(each.name, name)
        del each.indexes[name]
        return f"{each.database}.{each.name}: drop index {name}"

    def _load(self) -> str | None:
        each = self._one(lambda c: c.vectors_indexed and not c.loaded)
        if each is None or self._loaded() >= LOADED_MAX:
            return None
        client = self._client(each.database)
        if each.shape.has_partition_key or self.rng.random() < 0.5:
            client.load_collection(each.name)
            each.loaded, each.wholly = set(each.partitions), True
            return f"{each.database}.{each.name}: load"
        some = self.rng.sample(sorted(each.partitions), self.rng.randint(1, len(each.partitions)))
        client.load_partitions(each.name, some)
        each.loaded, each.wholly = set(some), False
        return f"{each.database}.{each.name}: load partitions {some}"

    def _release(self) -> str | None:
        each = self._one(lambda c: bool(c.loaded))
        if each is None:
            return None
        client = self._client(each.database)
        if len(each.loaded) > 1 and not each.shape.has_partition_key and self.rng.random() < 0.4:
            partition = self.rng.choice(sorted(each.loaded))
            client.release_partitions(each.name, [partition])
            each.loaded.discard(partition)
            return f"{each.database}.{each.name}: release partition {partition}"
        client.release_collection(each.name)
        each.loaded, each.wholly = set(), False
        return f"{each.database}.{each.name}: release"

    # ---- the rest

    def _properties(self) -> str | None:
        each = self._one(lambda c: True)
        if each is None:
            return None
        # Long enough to expire nothing.
        properties = {"collection.ttl.seconds": str(self.rng.randint(10, 99) * 100_000)}
        self._client(each.database).alter_collection_properties(each.name, properties)
        return f"{each.database}.{each.name}: alter properties {properties}"

    def _flush(self) -> str | None:
        each = self._one(lambda c: True)
        if each is None:
            return None
        self._client(each.database).flush(each.name)
        return f"{each.database}.{each.name}: flush"

    def _role(self) -> str:
        root, rng = self._root(), self.rng
        role = f"{self.role_prefix}_{rng.randint(0, 4)}"
        grants = self._roles.get(role)
        if grants is None:
            root.create_role(role)
            self._roles[role] = set()
            return f"create role {role}"
        if grants and rng.random() < 0.3:
            database, object_name, privilege = grant = rng.choice(sorted(grants))
            root.revoke_privilege(role, "Collection", privilege, object_name, db_name=database)
            grants.discard(grant)
            return f"revoke {privilege} on {database}.{object_name} from {role}"
        if not grants and rng.random() < 0.3:
            root.drop_role(role)
            del self._roles[role]
            return f"drop role {role}"
        database, object_name = rng.choice(self.databases), rng.choice(["*", "c1", "c2"])
        privilege = rng.choice(_PRIVILEGES)
        root.grant_privilege(role, "Collection", privilege, object_name, db_name=database)
        grants.add((database, object_name, privilege))
        return f"grant {privilege} on {database}.{object_name} to {role}"

    # ---- choosing

    def _one(self, fits: Callable[[Living], bool]) -> Living | None:
        possible = [each for each in self.living if fits(each)]
        return self.rng.choice(possible) if possible else None

    def _all_databases(self) -> list[str]:
        return [*self.databases, self.extra] if self._extra_there else self.databases

    def _free_name(self, database: str) -> str | None:
        taken = {each.name for each in self.living if each.database == database}
        taken |= {alias for where, alias in self._aliases if where == database}
        free = sorted({f"c{n}" for n in range(NAMES_PER_DATABASE)} - taken)
        return self.rng.choice(free) if free else None

    def _loaded(self) -> int:
        return sum(bool(each.loaded) for each in self.living)

    def _client(self, database: str) -> MilvusClient:
        if database not in self._clients:
            # Without a token 2.3.5 refuses grants, even where it asks nobody for a password.
            self._clients[database] = MilvusClient(uri=self.uri, token=ROOT_TOKEN, db_name=database)
        return self._clients[database]

    def _root(self) -> MilvusClient:
        return self._client("default")

    def _say(self, said: str | None) -> str:
        assert said is not None
        self.done.append(said)
        return said
