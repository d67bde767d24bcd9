"""Letters as records of one Kafka topic; a record's key is the row's primary key as JSON.

Law: a letter that is too large for the topic goes without its row, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from milvuscdc.v1 import dead_letters_pb2, sink_kafka_pb2

from milvus_cdc.dead_letters import FIELD, Letter
from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.kafka import settings
from milvus_cdc.sink.kafka.broker import Brokers
from milvus_cdc.sink.kafka.deliveries import HandingOver
from milvus_cdc.sink.kafka.producers import Producers

_HEADERS = [("content-type", b"application/json")]


class LetterTopic:
    """See `milvus_cdc.dead_letters.Place`."""

    def __init__(self, spec: dead_letters_pb2.DeadLetterTopic, secrets: SecretResolver) -> None:
        """No I/O. Raises UserError for settings and secrets that cannot be used."""
        self._topic = spec.topic
        kafka = sink_kafka_pb2.KafkaSink(
            brokers=spec.brokers,
            topic=spec.topic,
            security=spec.security if spec.HasField("security") else None,
            librdkafka=spec.librdkafka,
        )
        base = settings.connection(kafka, secrets)
        producer = settings.producer(kafka, base)
        settings.check(producer, kafka)
        self._brokers = Brokers(kafka, base)
        self._producers = Producers(producer, self._brokers.names)

    async def probe(self) -> str:
        field = f"{FIELD}.kafka.topic"
        try:
            return await self._brokers.probe({self._topic: field})
        except UserError as error:
            if error.reason != "SINK_TOPIC_MISSING":
                raise
            raise UserError(
                error.reason,
                f"topic {self._topic} does not exist at {self._brokers.names}; make it, with a "
                "`max.message.bytes` that the rows fit in",
                field=field,
            ) from error

    async def put(self, letters: Sequence[Letter], timeout_seconds: float) -> None:
        try:
            await self._send(letters, timeout_seconds, with_row=True)
        except UserError as error:
            if error.reason != "RECORD_TOO_LARGE":
                raise
            for letter in letters:
                await self._put_one(letter, timeout_seconds)

    async def _put_one(self, letter: Letter, timeout_seconds: float) -> None:
        try:
            await self._send([letter], timeout_seconds, with_row=True)
        except UserError as error:
            if error.reason != "RECORD_TOO_LARGE":
                raise
            await self._send([letter], timeout_seconds, with_row=False)

    async def _send(self, letters: Sequence[Letter], seconds: float, *, with_row: bool) -> None:
        def hand_over(handing: HandingOver) -> None:
            for letter in letters:
                value = letter.encode(with_row=with_row)
                handing.one(self._topic, value, letter.key, _HEADERS)

        await self._producers.send(hand_over, seconds)

    async def close(self) -> None:
        await self._producers.close()
        self._brokers.close()
