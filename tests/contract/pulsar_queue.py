"""A topic on a real Pulsar with the handles of `queues.Queue`, in a namespace of its own.

Pulsar forgets whole ledgers only, so it needs a broker with small ones (`LEDGER_ENTRIES`), and what
nobody holds back goes at once: a subscription that acknowledges nothing keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any
from urllib.error import HTTPError
from uuid import uuid4

import pulsar
from milvus_cdc.source import PulsarConfig
from milvus_cdc.source.pulsar_positions import Place, decode, encode
from milvus_cdc.source.registry import open_source

from tests.servers.pulsar import PulsarServer

LEDGER_ENTRIES = 5
SMALL_LEDGERS = {
    "managedLedgerMaxEntriesPerLedger": str(LEDGER_ENTRIES),
    "managedLedgerMinLedgerRolloverTimeMinutes": "0",
}


class PulsarQueue:
    place = encode(Place(1, 1))
    foreign = b"\x07" + bytes(7)
    repeats = False

    def __init__(self, server: PulsarServer, *, admin: bool = True) -> None:
        self._server = server
        self.namespace = f"contract-{uuid4().hex}"
        self.config = PulsarConfig(
            server.service_url, server.admin_url if admin else "", namespace=self.namespace
        )
        self.source = open_source(self.config)
        self.topic = "by-dev-rootcoord-dml_0"
        self.compression = pulsar.CompressionType.ZSTD
        server.admin("PUT", f"namespaces/public/{self.namespace}")

    @property
    def path(self) -> str:
        return f"persistent/public/{self.namespace}/{self.topic}"

    def beyond(self, end: bytes) -> list[bytes]:
        ledger, entry, _ = decode(end)
        return [encode(Place(ledger, entry + 1)), encode(Place(ledger + 1000, 0))]

    async def create(self) -> None:
        await asyncio.to_thread(self._create)

    def _create(self) -> None:
        for path, body in (
            (self.path, None),
            (f"{self.path}/subscription/keeper", {"ledgerId": -1, "entryId": -1}),
        ):
            try:
                self._server.admin("PUT", path, body)
            except HTTPError as error:
                # A reader that is left makes its topic again.
                if error.code != 409:
                    raise

    async def append(self, *payloads: bytes, streaming: bool = False) -> None:
        properties = {"traceparent": "00-x"} | ({"_v": "1"} if streaming else {})
        await asyncio.to_thread(self.produce, payloads, properties)

    def produce(
        self, payloads: tuple[bytes, ...], properties: dict[str, str], batch: int = 0
    ) -> None:
        """As Milvus' producer does, or in batches of so many."""
        client = pulsar.Client(
            self._server.service_url,
            logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, "/dev/null"),
        )
        try:
            producer = client.create_producer(
                f"persistent://public/{self.namespace}/{self.topic}",
                compression_type=self.compression,
                batching_enabled=batch > 0,
                batching_max_messages=max(batch, 2),
                batching_max_publish_delay_ms=1000,
            )
            for payload in payloads:
                producer.send_async(payload, lambda *_: None, properties=properties)
            producer.flush()
        finally:
            client.close()

    async def truncate(self, first: bytes) -> None:
        await asyncio.to_thread(self._truncate, decode(first))

    def _truncate(self, first: Place) -> None:
        self._server.retain(0, 0, f"public/{self.namespace}")
        if first.batch:
            self._server.admin("POST", f"{self.path}/subscription/keeper/skip_all")
            self._server.admin("PUT", f"{self.path}/unload")
        else:
            at = {"ledgerId": first.ledger, "entryId": first.entry, "partitionIndex": -1}
            self._server.admin("POST", f"{self.path}/subscription/keeper/resetcursor", at)
        deadline = time.monotonic() + 20
        while True:
            self._server.admin("POST", f"{self.path}/trim")
            held = [ledger for ledger in self.ledgers() if ledger["entries"]]
            if not first.batch and held and held[0]["ledgerId"] >= first.ledger:
                return
            if first.batch and not held:
                return
            assert time.monotonic() < deadline, f"{held} is not trimmed to {first}"
            time.sleep(0.1)

    def ledgers(self) -> list[dict[str, Any]]:
        stats: Any = self._server.admin("GET", f"{self.path}/internalStats")
        stats["ledgers"][-1]["entries"] = stats["currentLedgerEntries"]
        return list(stats["ledgers"])

    async def limit(self, *, age_ms: int, size: int) -> None:
        self.compression = pulsar.CompressionType.NONE
        await asyncio.to_thread(
            self._server.retain, age_ms // 60_000, size // 2**20, f"public/{self.namespace}"
        )

    async def delete(self) -> None:
        def delete() -> None:
            with contextlib.suppress(HTTPError):
                self._server.admin("DELETE", f"{self.path}?force=true")

        await asyncio.to_thread(delete)

    async def stop_server(self) -> None:
        await asyncio.to_thread(self._server.kill)

    async def start_server(self) -> None:
        await asyncio.to_thread(self._server.start)
