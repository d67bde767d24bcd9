"""One real Milvus followed by another: every shape of collection, rows and schema, proved equal."""

from __future__ import annotations

import random
import time
from pathlib import Path

from pymilvus import MilvusClient

from tests.e2e.load import SHAPES, Load, create_collection, make_row
from tests.e2e.pair import Pair
from tests.servers import Stack


def test_every_shape_under_mixed_load_ends_equal(nats_stack: Stack, tmp_path: Path) -> None:
    load = Load(nats_stack.source.uri, "follow_mixed")
    load.create()
    with Pair(nats_stack, tmp_path) as pair:
        load.start()
        time.sleep(3)
        pair.create("follow_mixed.*")
        time.sleep(6)
        load.stop()
        names = [f"follow_mixed.{shape.name}" for shape in SHAPES]
        pair.wait_running(*names)
        assert pair.prove() > 1_000
        sink = MilvusClient(uri=nats_stack.sink.uri, db_name="follow_mixed")
        source = MilvusClient(uri=nats_stack.source.uri, db_name="follow_mixed")
        for shape in SHAPES:
            ours = sink.describe_collection(shape.name)
            theirs = source.describe_collection(shape.name)
            assert ours["num_shards"] == theirs["num_shards"]
            assert sorted(sink.list_partitions(shape.name)) == sorted(
                source.list_partitions(shape.name)
            )
            assert sink.list_indexes(shape.name) == source.list_indexes(shape.name)
            assert not any(f.get("auto_id") for f in ours["fields"])
        conditions = pair.collections()["follow_mixed.auto"].conditions
        assert [c.type for c in conditions] == ["AUTO_ID_KEYS"]
        pair.quiet()


def test_objects_made_and_dropped_in_the_stream_are_made_and_dropped_at_the_sink(
    nats_stack: Stack, tmp_path: Path
) -> None:

    rng = random.Random(1)
    shape = SHAPES[0]
    MilvusClient(uri=nats_stack.source.uri).create_database("follow_ddl")
    source = MilvusClient(uri=nats_stack.source.uri, db_name="follow_ddl")
    with Pair(nats_stack, tmp_path) as pair:
        pair.create("follow_ddl.*", "follow_late*.*")
        create_collection(source, shape)
        source.insert(shape.name, [make_row(shape, rng, n) for n in range(100)])
        pair.wait_running(f"follow_ddl.{shape.name}")
        sink = MilvusClient(uri=nats_stack.sink.uri, db_name="follow_ddl")

        # A partition, its rows, its end, and its name given anew.
        source.create_partition(shape.name, "again")
        source.insert(
            shape.name, [make_row(shape, rng, n) for n in range(100, 150)], partition_name="again"
        )
        source.release_partitions(shape.name, ["again"])
        source.drop_partition(shape.name, "again")
        source.create_partition(shape.name, "again")
        source.load_partitions(shape.name, ["again"])
        source.insert(
            shape.name, [make_row(shape, rng, n) for n in range(200, 240)], partition_name="again"
        )
        assert pair.prove() == 140

        # The collection dropped and made again under its name, with other rows.
        source.drop_collection(shape.name)
        create_collection(source, shape)
        source.insert(shape.name, [make_row(shape, rng, n) for n in range(1000, 1030)])

        def only_the_new_one() -> bool:
            [one] = pair.collections().values()
            return one.rows_inserted == 30

        pair.wait("the new collection alone", only_the_new_one)
        assert pair.prove() == 30

        # A database that comes later, with a collection, and goes.
        MilvusClient(uri=nats_stack.source.uri).create_database("follow_late")
        late = MilvusClient(uri=nats_stack.source.uri, db_name="follow_late")
        create_collection(late, SHAPES[4])
        late.insert("binary", [make_row(SHAPES[4], rng, n) for n in range(10)])
        pair.wait_running("follow_late.binary")
        assert pair.prove("follow_late.binary") == 10
        late.drop_collection("binary")
        whole_sink = MilvusClient(uri=nats_stack.sink.uri)
        pair.wait("the drop", lambda: "follow_late.binary" not in pair.collections())
        MilvusClient(uri=nats_stack.source.uri).drop_database("follow_late")
        pair.wait("the database gone", lambda: "follow_late" not in whole_sink.list_databases())

        # An index and the load state.
        source.release_collection(shape.name)
        source.drop_index(shape.name, "vector")
        pair.wait("released", lambda: sink.list_indexes(shape.name) == [])
        params = source.prepare_index_params()
        params.add_index("vector", index_type="HNSW", metric_type="IP", M=8, efConstruction=64)
        source.create_index(shape.name, params)
        source.load_collection(shape.name)
        pair.wait("index", lambda: sink.list_indexes(shape.name) == ["vector"])
        assert sink.describe_index(shape.name, "vector")["index_type"] == "HNSW"
        assert pair.prove() == 30

        # One partition of a collection that was loaded as a whole.
        def loaded() -> set[str]:
            states = {
                name: sink.get_load_state(shape.name, partition_name=name)["state"]
                for name in sink.list_partitions(shape.name)
            }
            return {name for name, state in states.items() if "Loaded" in str(state)}

        whole = set(source.list_partitions(shape.name))
        source.release_partitions(shape.name, ["_default"])
        pair.wait("one partition released", lambda: loaded() == whole - {"_default"})
        source.create_partition(shape.name, "served")
        pair.wait("a new one serves", lambda: loaded() == whole - {"_default"} | {"served"})
        source.load_partitions(shape.name, ["_default"])
        pair.wait("all of it loaded again", lambda: loaded() == whole | {"served"})
        assert pair.prove() == 30
        pair.quiet()
