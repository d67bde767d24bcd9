"""Letters as files of JSON lines, one file for the rows of one refused batch.

`{task}/{database}.{collection}-{collection id}/{time}-{random}.jsonl`, names of the source.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import quote

from milvuscdc.v1 import dead_letters_pb2

from milvus_cdc.dead_letters import FIELD, Letter
from milvus_cdc.errors import UnknownOutcomeError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.files.opening import open_store_of


class LetterFiles:
    """See `milvus_cdc.dead_letters.Place`."""

    def __init__(self, spec: dead_letters_pb2.DeadLetterFiles, secrets: SecretResolver) -> None:
        """No I/O. Raises UserError for a secret or a URI that cannot be used."""
        self._store = open_store_of(spec, secrets, f"{FIELD}.files")

    async def probe(self) -> str:
        return await asyncio.to_thread(self._store.probe)

    async def put(self, letters: Sequence[Letter], timeout_seconds: float) -> None:
        table = letters[0].table
        collection = f"{table.source_database}.{table.source_collection}"
        task = table.task.partition("/")[2] or table.task
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")[:-3]
        path = (
            f"{_segment(task)}/{_segment(collection)}-{table.collection_id}/"
            f"{now}Z-{uuid.uuid4().hex}.jsonl"
        )
        data = b"".join(letter.encode() + b"\n" for letter in letters)
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.to_thread(self._store.put, path, data)
        except TimeoutError:
            raise UnknownOutcomeError(
                "DEAD_LETTERS_TIMEOUT", f"{self._store.uri} did not answer in time"
            ) from None

    async def close(self) -> None:
        """Nothing is held."""


def _segment(name: str) -> str:
    return quote(name, safe="") or "_"
