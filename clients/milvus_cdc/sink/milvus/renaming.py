"""Giving one sink collection another name, in its own or another database.

Law: idempotent. What has the wanted name and our id is done; a name that something else has is
never taken from it.

Facts of 2.3.5, seen: rename keeps id, rows, indexes and load state, and aliases within the same
database; into another database (`newDBName`) it is refused while the collection has aliases; a name
that is a collection's or an alias' is refused as "duplicated", also the collection's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.model import Collection
from milvus_cdc.sink.milvus.calls import DDL_SECONDS
from milvus_cdc.sink.milvus.capabilities import Capabilities
from milvus_cdc.sink.milvus.objects import Objects


async def rename(
    client: MilvusClient,
    objects: Objects,
    known: Capabilities,
    want: Collection,
    renamed_from: tuple[str, str],
    sink_collection_id: int,
) -> None:
    """As `Sink.rename_collection` says."""
    old = replace(want, database=renamed_from[0], name=renamed_from[1])
    there = await _look(objects, want)
    if there is not None and sink_collection_id:
        if there.collectionID == sink_collection_id:
            return
    elif there is not None and await _look(objects, old) is None:
        return  # ids are not told: it is what has left the old name
    if not known.rename or (want.database != old.database and not known.databases):
        raise UserError(
            "SINK_CANNOT_RENAME",
            f"{known.name} cannot rename {old.full_name} to {want.full_name}; exclude it, or "
            "`milvus-cdc task resync` after it is dropped there",
        )
    await objects.insist(old, sink_collection_id)
    request = milvus_pb2.RenameCollectionRequest(
        db_name=old.database, oldName=old.name, newName=want.name, newDBName=want.database
    )
    try:
        await client.ask("RenameCollection", request, timeout=DDL_SECONDS, database=old.database)
    except Refusal as refusal:
        if refusal.says("duplicated", "already exist"):
            raise RetryableError(
                "SINK_NAME_TAKEN",
                f"{old.full_name} is to be called {want.full_name} at the sink, where a collection "
                "or alias that this task does not own has that name; drop or rename that",
            ) from refusal
        if refusal.says("alias"):
            raise RetryableError(
                "SINK_HAS_ALIASES",
                f"{old.full_name} cannot move to database {want.database!r} at the sink while it "
                f"has aliases there: {refusal.text}",
            ) from refusal
        raise client.error(refusal) from refusal


async def _look(objects: Objects, want: Collection) -> Any | None:
    """None as well for an alias of that name."""
    try:
        return await objects.describe(want)
    except UserError as error:
        if error.reason != "SINK_NAME_IS_ALIAS":
            raise
        return None
