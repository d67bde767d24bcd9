"""Questions and orders to the brokers that are not rows: topics, their settings, rights.

Laws: a topic is made only where the task says how; what is there is never changed; blocking calls
run in threads.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from confluent_kafka import (
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AclOperation,
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)
from milvuscdc.v1 import sink_kafka_pb2

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.kafka_faults import LastFault
from milvus_cdc.kafka_security import LibraryLog, Settings
from milvus_cdc.sink.kafka.failures import translate
from milvus_cdc.sink.kafka.settings import FIELD

REQUEST_SECONDS = 8.0
SETTLE_SECONDS = 10.0
"""How long a new topic may take to be known everywhere."""


class Brokers:
    """Connected at the first question."""

    def __init__(self, spec: sink_kafka_pb2.KafkaSink, settings: Settings) -> None:
        self.names = ",".join(spec.brokers)
        self._spec = spec
        self._fault = LastFault()
        self._settings = {
            **settings,
            "allow.auto.create.topics": False,
            "error_cb": self._fault,
            "logger": LibraryLog(),
        }
        self._client: AdminClient | None = None
        self._made = threading.Lock()

    async def probe(self, topics: Mapping[str, str]) -> str:
        """What answers, for a person. `topics`: names known beforehand, and the field of each;
        those must exist or be makeable, and be writable.
        """
        return await asyncio.to_thread(self._probe, topics)

    async def probe_topic(
        self, topic: str, field: str, creation: sink_kafka_pb2.KafkaTopicCreation
    ) -> None:
        """Raises what would keep `ensure_as` from making it, or us from writing there."""
        await asyncio.to_thread(self._probe_topics, {topic: field}, creation)

    async def ensure(self, topic: str, field: str) -> None:
        """The topic exists when this returns. Raises UserError SINK_TOPIC_MISSING."""
        creation = self._spec.create_topics if self._spec.HasField("create_topics") else None
        await asyncio.to_thread(self._ensure, topic, field, creation)

    async def ensure_as(
        self, topic: str, field: str, creation: sink_kafka_pb2.KafkaTopicCreation
    ) -> int:
        """As `ensure`, made as told by `creation`; how many partitions it has."""
        return await asyncio.to_thread(self._ensure, topic, field, creation)

    async def exists(self, topic: str) -> bool:
        return bool((await asyncio.to_thread(self._describe, [topic]))[topic])

    async def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """First offset, and the one after the last record, whether it is committed or not."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                return (await asyncio.to_thread(self._ends, topic, [partition]))[partition]
            except RetryableError:
                # The leader of a new topic, or after an election, may not know it yet.
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.1)

    async def policy(self, topic: str) -> str:
        """`cleanup.policy`; empty when we may not know."""
        return await asyncio.to_thread(self._policy, topic)

    async def empty(self, topic: str) -> None:
        """Deletes the records that are there now. Raises UserError where that is not allowed, or
        the topic is only compacted.
        """
        await asyncio.to_thread(self._empty, topic)

    def close(self) -> None:
        self._client = None

    # Everything below blocks.

    def _probe(self, topics: Mapping[str, str]) -> str:
        cluster = self._ask(
            "describing the cluster",
            lambda client: client.describe_cluster(request_timeout=REQUEST_SECONDS),
        )
        creation = self._spec.create_topics if self._spec.HasField("create_topics") else None
        self._probe_topics(topics, creation)
        nodes = cluster.nodes or []
        return f"Kafka cluster {cluster.cluster_id}, {len(nodes)} broker(s)"

    def _probe_topics(
        self, topics: Mapping[str, str], creation: sink_kafka_pb2.KafkaTopicCreation | None
    ) -> None:
        described = self._describe(topics, rights=True)
        for topic, field in topics.items():
            found = described[topic]
            if not found:
                self._probe_creation(topic, field, creation)
            elif found.authorized_operations and (
                not {AclOperation.WRITE, AclOperation.ALL} & set(found.authorized_operations)
            ):
                raise UserError(
                    "SINK_ACCESS_DENIED",
                    f"Kafka at {self.names} does not let this login write to topic {topic}; "
                    "grant it WRITE",
                    field=field,
                )

    def _probe_creation(
        self, topic: str, field: str, creation: sink_kafka_pb2.KafkaTopicCreation | None
    ) -> None:
        if creation is None:
            raise self._missing(topic, field)
        new = _new(topic, creation)
        self._ask(
            f"making topic {topic} (tried only)",
            lambda client: client.create_topics(
                [new], request_timeout=REQUEST_SECONDS, validate_only=True
            )[topic],
        )

    def _ensure(
        self,
        topic: str,
        field: str,
        creation: sink_kafka_pb2.KafkaTopicCreation | None,
    ) -> int:
        found = self._describe([topic])[topic]
        if found:
            return len(found.partitions)
        if creation is None:
            raise self._missing(topic, field)
        new = _new(topic, creation)
        try:
            self._ask(
                f"making topic {topic}",
                lambda client: client.create_topics([new], request_timeout=REQUEST_SECONDS)[topic],
            )
        except _Exists:
            pass  # another replicator was faster
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            found = self._describe([topic])[topic]
            if found and all(p.leader is not None for p in found.partitions):
                return len(found.partitions)
            time.sleep(0.05)
        raise RetryableError("SINK_ERROR", f"topic {topic} was made and is not there yet")

    def _missing(self, topic: str, field: str) -> UserError:
        return UserError(
            "SINK_TOPIC_MISSING",
            f"topic {topic} does not exist at {self.names} and the task may not make it: make it, "
            f"or say in {FIELD}.create_topics how to",
            field=field,
        )

    def _describe(self, topics: Iterable[str], *, rights: bool = False) -> dict[str, Any]:
        """By name; None where there is none. Never makes one."""
        names = list(topics)
        if not names:
            return {}
        # Called for its side effect of naming them: each has an answer of its own.
        futures = self._call(
            lambda client: client.describe_topics(
                TopicCollection(names),
                include_authorized_operations=rights,
                request_timeout=REQUEST_SECONDS,
            )
        )
        found: dict[str, Any] = {}
        for name in names:
            try:
                found[name] = self._wait(futures[name], f"describing topic {name}")
            except _NoTopic:
                found[name] = None
        return found

    def _ends(self, topic: str, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        wanted = [TopicPartition(topic, partition) for partition in partitions]
        sides = []
        for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):
            asked = {partition: spec for partition in wanted}
            futures = self._call(
                lambda client, asked=asked: client.list_offsets(
                    asked,
                    isolation_level=IsolationLevel.READ_UNCOMMITTED,
                    request_timeout=REQUEST_SECONDS,
                )
            )
            try:
                sides.append(
                    {
                        each.partition: self._wait(
                            futures[each], f"looking for the ends of {topic}"
                        ).offset
                        for each in wanted
                    }
                )
            except _NoTopic as error:
                raise translate(error.error, self.names, f"topic {topic}") from None
        first, last = sides
        if min(*first.values(), *last.values()) < 0:
            raise RetryableError("SINK_ERROR", f"the ends of topic {topic} are not known yet")
        return {partition: (first[partition], last[partition]) for partition in partitions}

    def _policy(self, topic: str) -> str:
        resource = ConfigResource(ResourceType.TOPIC, topic)
        try:
            entries = self._ask(
                f"reading the settings of topic {topic}",
                lambda client: client.describe_configs([resource], request_timeout=REQUEST_SECONDS)[
                    resource
                ],
            )
        except (UserError, _NoTopic):
            return ""
        entry = entries.get("cleanup.policy")
        return str(entry.value) if entry is not None else ""

    def _empty(self, topic: str) -> None:
        described = self._describe([topic])[topic]
        if not described:
            return
        partitions = [partition.id for partition in described.partitions]
        ends = self._ends(topic, partitions)
        wanted = [
            TopicPartition(topic, p, last) for p, (first, last) in ends.items() if last > first
        ]
        if not wanted:
            return
        futures = self._call(
            lambda client: client.delete_records(wanted, request_timeout=REQUEST_SECONDS)
        )
        for future in futures.values():
            self._wait(future, f"emptying topic {topic}")

    def _ask(self, what: str, call: Any) -> Any:
        """One question with one answer."""
        return self._wait(self._call(call), what)

    def _call(self, call: Any) -> Any:
        # Threads ask at the same time; a second client would be destroyed with its question open.
        with self._made:
            if self._client is None:
                self._client = AdminClient(self._settings)
            client = self._client
        return call(client)

    def _wait(self, future: Any, what: str) -> Any:
        started = time.monotonic()
        try:
            return future.result(REQUEST_SECONDS + 2)
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            if reason.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                raise _Exists from None
            if reason.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
                raise _NoTopic(reason) from None
            raise self._translated(reason, what, started) from error
        except TimeoutError as error:
            raise RetryableError(
                "SINK_TIMEOUT", f"Kafka at {self.names} does not answer: {what}"
            ) from error

    def _translated(self, error: KafkaError, what: str, started: float) -> CdcError:
        # What went wrong with the connection waits for somebody who asks.
        if self._client is not None:
            self._client.poll(0)
        return translate(error, self.names, what, self._fault.since(started - REQUEST_SECONDS))


class _Exists(Exception):
    """The topic was there."""


class _NoTopic(Exception):
    """It was not."""

    def __init__(self, error: KafkaError) -> None:
        self.error = error


def _new(topic: str, creation: sink_kafka_pb2.KafkaTopicCreation) -> NewTopic:
    return NewTopic(
        topic,
        num_partitions=creation.partitions,
        replication_factor=creation.replication_factor or -1,
        config=dict(creation.config),
    )
