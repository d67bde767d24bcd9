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
from milvus_cdc.sink.files.opening import open_store
from milvus_cdc.sink.registry import resolve


class LetterFiles:
    """See `milvus_cdc.dead_letters.Place`."""

    def __init__(self, spec: dead_letters_pb2.DeadLetterFiles, secrets: SecretResolver) -> None:
        """No I/O. Raises UserError for a secret or a URI that cannot be used."""
        s3, place = spec.s3, f"{FIELD}.files.s3"
        self._store = open_store(
            spec.uri,
            endpoint=s3.endpoint,
            region=s3.region,
            access_key_id=resolve(secrets, s3.access_key_id, f"{place}.access_key_id"),
            secret_access_key=resolve(secrets, s3.secret_access_key, f"{place}.secret_access_key"),
            session_token=resolve(secrets, s3.session_token, f"{place}.session_token"),
        )

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
