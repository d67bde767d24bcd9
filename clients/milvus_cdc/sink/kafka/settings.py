"""A task's Kafka sink as settings of librdkafka.

Laws: what the promises rest on (acknowledgement, idempotence, transactions, placement, time limits)
is the sink's own and refused by name; secrets come by reference only; a setting that librdkafka
does not know or does not take is refused with its name, before anything is connected.

Names and ranges: librdkafka's CONFIGURATION.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from milvuscdc.v1 import sink_kafka_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.kafka_security import Settings, blamed, refused, security_settings
from milvus_cdc.secrets import SecretResolver

FIELD = "sink.kafka"
SECURITY = f"{FIELD}.security"
QUEUE_KIBIBYTES = 64 * 1024
"""What one producer holds before it asks us to wait; librdkafka's own default is 1 GiB."""

_OURS = {
    "acks": "it is always `all`",
    "request.required.acks": "it is always `all`",
    "enable.idempotence": "it is always on",
    "transactional.id": "it is made of task and collection; see `delivery`",
    "partitioner": "a key's partition is always that of the Java client (murmur2)",
    "bootstrap.servers": "use `brokers`",
    "metadata.broker.list": "use `brokers`",
    "security.protocol": "use `security`",
    "compression.codec": "use `compression`",
    "compression.type": "use `compression`",
    "message.timeout.ms": "it follows the time a write may take",
    "delivery.timeout.ms": "it follows the time a write may take",
    "delivery.report.only.error": "the sink needs every report",
    "allow.auto.create.topics": "use `create_topics`",
    "plugin.library.paths": "a task may not load libraries",
    "ssl.engine.location": "a task may not load libraries",
    "ssl.providers": "a task may not load libraries",
    "ssl.ca.location": "use `security.tls.ca_file`",
    "ssl.certificate.location": "use `security.tls.certificate_file`",
    "ssl.key.location": "use `security.tls.key_file`",
    "ssl.key.password": "use `security.tls.key_password`",
    "ssl.keystore.location": "use `security.tls`",
    "ssl.keystore.password": "use `security.tls`",
    "ssl.key.pem": "use `security.tls.key_file`",
    "ssl.certificate.pem": "use `security.tls.certificate_file`",
    "ssl.ca.pem": "use `security.tls.ca_file`",
    "logger": "it is no setting of librdkafka",
    "on_delivery": "it is no setting of librdkafka",
}
_FAMILIES = {
    "sasl.": "use `security.sasl`",
    "oauth": "use `security.sasl.oauth`",
}
_COMPRESSION = {
    sink_kafka_pb2.KAFKA_COMPRESSION_GZIP: "gzip",
    sink_kafka_pb2.KAFKA_COMPRESSION_SNAPPY: "snappy",
    sink_kafka_pb2.KAFKA_COMPRESSION_LZ4: "lz4",
    sink_kafka_pb2.KAFKA_COMPRESSION_ZSTD: "zstd",
}


def connection(spec: sink_kafka_pb2.KafkaSink, secrets: SecretResolver) -> Settings:
    """What every client of this sink is made with. Raises UserError."""
    settings = _foreign(spec)
    settings["bootstrap.servers"] = ",".join(spec.brokers)
    settings |= security_settings(spec.security, secrets, SECURITY)
    return settings


def _foreign(spec: sink_kafka_pb2.KafkaSink) -> Settings:
    """The task's own settings of librdkafka. Raises UserError for those it may not make."""
    for name in sorted(spec.librdkafka):
        reason = _OURS.get(name)
        if reason is None:
            reason = next((r for f, r in _FAMILIES.items() if name.startswith(f)), None)
        if reason is None and (name.endswith("_cb") or "password" in name):
            reason = "a task cannot set it"
        if reason is not None:
            field = f"{FIELD}.librdkafka.{name}"
            raise UserError("INVALID_FIELD", f"{field} cannot be set: {reason}", field=field)
    return dict(spec.librdkafka)


def producer(spec: sink_kafka_pb2.KafkaSink, base: Settings) -> Settings:
    """`base` and what every producer of this sink has besides."""
    return {
        "queue.buffering.max.kbytes": QUEUE_KIBIBYTES,
        **base,
        "compression.type": _COMPRESSION.get(spec.compression, "none"),
        "acks": "all",
        "enable.idempotence": True,
        # The Java client's placement; the library's own default is another one (CRC32).
        "partitioner": "murmur2_random",
        # A topic that somebody deleted must not come back with the broker's defaults.
        "allow.auto.create.topics": False,
    }


def check(settings: Mapping[str, Any], spec: sink_kafka_pb2.KafkaSink) -> None:
    """Whether librdkafka takes them; connects to nothing. Raises UserError."""
    # Without brokers a client starts, complains and connects to nobody.
    offline = {k: v for k, v in settings.items() if k != "bootstrap.servers"}
    own = {name: offline.pop(name) for name in spec.librdkafka}
    reason = refused(offline)
    if reason is not None:
        raise UserError("INVALID_FIELD", f"{SECURITY}: {reason}", field=blamed(reason, SECURITY))
    reason = refused({**offline, **own}) if own else None
    if reason is None:
        return
    # Not every message of the library names the setting by the name that was used.
    name = next(
        (name for name, value in own.items() if refused({**offline, name: value})),
        next((name for name in own if name in reason), ""),
    )
    field = f"{FIELD}.librdkafka" + (f".{name}" if name else "")
    raise UserError("INVALID_FIELD", f"{field}: {reason}", field=field)


def message_timeout_ms(timeout_seconds: float) -> int:
    """How long the library may try to deliver a record of a write that may take `timeout_seconds`:
    at most three eighths of it, for encoding a batch takes time too on a busy machine. From a few
    values only, because it is fixed per producer.
    """
    return int(375 * 2 ** math.floor(math.log2(max(timeout_seconds, 0.25))))
