"""The end of the demo: is the sink really equal?

Law: nothing here trusts a counter of the replication; both clusters are asked themselves.
"""

from __future__ import annotations

from pymilvus import MilvusClient

from examples.demo import data
from examples.demo.services import Demo

QUERIES = 100
NEIGHBOURS = 10
_Hits = list[list[tuple[int, float]]]


class Disproved(Exception):
    """Source and sink differ, or something did not go as it had to."""


def verify(demo: Demo, task: str) -> None:
    """Every row of every collection, field by field: the product's own comparison."""
    code = demo.run("verify", task.removeprefix("tasks/"))
    if code != 0:
        what = "source and sink are not equal" if code == 1 else "it could not compare them"
        raise Disproved(f"milvus-cdc verify ended with exit code {code}: {what}")


def same_neighbours(demo: Demo) -> None:
    """The ten nearest images of the first hundred digits, on both sides."""
    table = data.digits()
    images = [row[table.vector] for row in table.rows(0, QUERIES)]
    source = _search(demo.stack.source.uri, table, images)
    sink = _search(demo.stack.sink.uri, table, images)
    wrong = [n for n in range(QUERIES) if source[n] != sink[n]]
    if wrong:
        n = wrong[0]
        raise Disproved(
            f"{len(wrong)} of {QUERIES} searches differ; query {n}: {source[n]} at the source,"
            f" {sink[n]} at the sink"
        )
    if any(len(hits) != NEIGHBOURS for hits in source):
        raise Disproved(f"a search found fewer than {NEIGHBOURS} neighbours")


def excluded_is_absent(demo: Demo) -> None:
    """What the task leaves out stays out."""
    client = MilvusClient(demo.stack.sink.uri)
    try:
        if client.has_collection(data.scratch().name):
            raise Disproved("default.scratch_notes is at the sink although the task excludes it")
    finally:
        client.close()


def only_the_new_one(demo: Demo, dim: int) -> None:
    """The collection that was dropped and created again is the second one."""
    table = data.sessions(dim)
    client = MilvusClient(demo.stack.sink.uri, db_name=table.database)
    try:
        fields = client.describe_collection(table.name)["fields"]
    finally:
        client.close()
    found = next(f["params"]["dim"] for f in fields if f["name"] == table.vector)
    if int(found) != dim:
        raise Disproved(f"{table.full_name} at the sink has dimension {found}, not {dim}")


def _search(uri: str, table: data.Table, vectors: list[list[float]]) -> _Hits:
    client = MilvusClient(uri, db_name=table.database)
    try:
        found = client.search(
            table.name,
            data=vectors,
            anns_field=table.vector,
            limit=NEIGHBOURS,
            search_params={"metric_type": table.metric},
            consistency_level="Strong",
        )
    finally:
        client.close()
    # Equal distances may come in any order.
    return [
        sorted(((hit["id"], hit["distance"]) for hit in hits), key=lambda h: (h[1], h[0]))
        for hits in found
    ]
