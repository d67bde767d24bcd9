"""Bulk imports in a source's metadata: values of a real 2.3.5, those documented of 2.4 and 2.5."""

from __future__ import annotations

import base64

from milvus_cdc.catalog import Assembly, Layout
from milvus_cdc.model import Catalogue, Import
from milvuscdc.internal import milvus_meta_pb2 as pb

from tests.servers import many

ROOT = "by-dev"
META = f"{ROOT}/meta/"
OF_2_3 = base64.b64decode(
    "CJeA0NeNxP3DBhgBIJSA0NeNxP3DBiiVgNDXjcT9wwYyKGltcC1yb290Y29vcmQtZG1sXzBfNDcwNjE1MzA3MDU2"
    "MzE2NDM2djBKDy9kYXRhL3Jvd3MuanNvblCQ1YXYBloPCAYSCZuA0NeNxP3DBiAyYgNpbXBqCF9kZWZhdWx0chcK"
    "EHByb2dyZXNzX3BlcmNlbnQSAzEwMHIUCgxwZXJzaXN0X2Nvc3QSBDEuMzV4kNWF2AY="
)
"""`importtask/470615307056316439`, as Milvus 2.3.5 wrote it for 50 rows of a JSON file."""


def assembly() -> Assembly:
    made = Assembly(Layout(ROOT))
    for key, value in [*many.cluster_keys(ROOT), *many.collection_keys(1, ROOT)]:
        made.apply(key, value)
    return made


def imports(catalogue: Catalogue) -> tuple[Import, ...]:
    [collection] = catalogue.collections
    return collection.imports


def of_2_3(**changes: int) -> bytes:
    task = pb.ImportTask.FromString(OF_2_3)
    task.collection_id = many.collection_id_of(1)
    task.state.state_code = changes.get("state", task.state.state_code)
    return task.SerializeToString()


def test_an_import_of_2_3_is_told_with_rows_and_time() -> None:
    made = assembly()
    assert imports(made.catalogue(1, 1)) == ()
    made.apply(f"{META}importtask/470615307056316439", of_2_3())
    seen = imports(made.catalogue(1, 2))
    assert seen == (Import(470615307056316439, 50, 1_795_254_928_000),)
    made.apply(f"{META}importtask/470615307056316439", None)
    assert imports(made.catalogue(1, 3)) == ()


def test_an_import_that_failed_brought_nothing() -> None:
    made = assembly()
    for state in (1, 7):
        made.apply(f"{META}importtask/470615307056316439", of_2_3(state=state))
        assert imports(made.catalogue(1, 1)) == ()


def test_an_import_of_another_collection_changes_nothing() -> None:
    made = assembly()
    before = made.catalogue(1, 1).collections
    made.apply(f"{META}importtask/470615307056316439", OF_2_3)
    after = made.catalogue(1, 2).collections
    assert after[0] is before[0]


def test_a_job_of_2_5_counts_the_rows_of_its_tasks() -> None:
    made = assembly()
    job = pb.ImportJob(
        job_id=7,
        collection_id=many.collection_id_of(1),
        state=5,
        start_time="2026-11-21T09:55:28Z",
    )
    made.apply(f"{META}datacoord-meta/import-job/7", job.SerializeToString())
    assert imports(made.catalogue(1, 1)) == (Import(7, 0, 1_795_254_928_000),)
    for number, rows in ((8, 30), (9, 12)):
        task = pb.ImportJobTask(job_id=7, file_stats=[pb.ImportFileStats(total_rows=rows)])
        made.apply(f"{META}datacoord-meta/import-task/{number}", task.SerializeToString())
    assert imports(made.catalogue(1, 2)) == (Import(7, 42, 1_795_254_928_000),)
    job.state = 4
    made.apply(f"{META}datacoord-meta/import-job/7", job.SerializeToString())
    assert imports(made.catalogue(1, 3)) == ()


def test_one_key_costs_one_collection_whatever_else_there_is() -> None:
    made = Assembly(Layout(ROOT))
    for key, value in many.cluster_keys(ROOT):
        made.apply(key, value)
    for number in range(50):
        for key, value in many.collection_keys(number, ROOT):
            made.apply(key, value)
    before = {c.collection_id: c for c in made.catalogue(1, 1).collections}
    changed = dict(many.collection_keys(7, ROOT, "described anew"))
    made.apply(many.info_key(7, ROOT), changed[many.info_key(7, ROOT)])
    made.apply(f"{META}root-coord/database/db-info/99", b"\x12\x04shop\x18\x63")
    after = {c.collection_id: c for c in made.catalogue(1, 2).collections}
    assert [number for number in before if after[number] is not before[number]] == [
        many.collection_id_of(7)
    ]
