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

import structlog
from confluent_kafka import KafkaError, KafkaException, Producer
from milvuscdc.v1 import sink_kafka_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver, resolve

log = structlog.get_logger()

Settings = dict[str, Any]

FIELD = "sink.kafka"
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
_MECHANISMS = {
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN: "PLAIN",
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_256: "SCRAM-SHA-256",
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_512: "SCRAM-SHA-512",
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_OAUTHBEARER: "OAUTHBEARER",
}


class LibraryLog:
    """librdkafka's own lines, in our log; it calls `log` as `logging.Logger` is called."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.ignored: list[str] = []
        """Complaints about settings that have no effect."""

    def log(self, level: int, form: str, *args: object) -> None:
        line = form % args if args else form
        if "CONFWARN" in line and "will be ignored" in line:
            self.ignored.append(line)
        # Its warnings are what it goes on trying by itself; errors reach us as errors.
        if not self._quiet:
            log.debug("kafka client", line=line)


def connection(spec: sink_kafka_pb2.KafkaSink, secrets: SecretResolver) -> Settings:
    """What every client of this sink is made with. Raises UserError."""
    settings = _foreign(spec)
    settings["bootstrap.servers"] = ",".join(spec.brokers)
    tls = spec.security.HasField("tls")
    sasl = spec.security.HasField("sasl")
    settings["security.protocol"] = ("SASL_" if sasl else "") + ("SSL" if tls else "PLAINTEXT")
    if tls:
        settings |= _tls(spec.security.tls, secrets)
    if sasl:
        settings |= _sasl(spec.security.sasl, secrets)
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
    refused = _refused(offline)
    if refused is not None:
        raise UserError("INVALID_FIELD", f"{FIELD}.security: {refused}", field=_blamed(refused))
    refused = _refused({**offline, **own}) if own else None
    if refused is None:
        return
    # Not every message of the library names the setting by the name that was used.
    name = next(
        (name for name, value in own.items() if _refused({**offline, name: value})),
        next((name for name in own if name in refused), ""),
    )
    field = f"{FIELD}.librdkafka" + (f".{name}" if name else "")
    raise UserError("INVALID_FIELD", f"{field}: {refused}", field=field)


def _refused(settings: Settings) -> str | None:
    logger = LibraryLog(quiet=True)
    try:
        client = Producer({**settings, "logger": logger})
        client.poll(0)
    except KafkaException as error:
        reason: KafkaError = error.args[0]
        return str(reason.str()).strip()
    except (TypeError, ValueError) as error:
        return str(error)
    return next((line.split("]: ")[-1] for line in logger.ignored), None)


def _blamed(text: str) -> str:
    places: Mapping[str, str] = {
        "ssl.ca.location": "tls.ca_file",
        "ssl.certificate.location": "tls.certificate_file",
        "ssl.key": "tls.key_file",
        "oauthbearer": "sasl.oauth",
        "sasl": "sasl",
    }
    found = next((place for name, place in places.items() if name in text), "")
    return f"{FIELD}.security" + (f".{found}" if found else "")


def _tls(tls: sink_kafka_pb2.KafkaTls, secrets: SecretResolver) -> Settings:
    field = f"{FIELD}.security.tls"
    if bool(tls.certificate_file) != bool(tls.key_file):
        missing = "key_file" if tls.certificate_file else "certificate_file"
        raise UserError(
            "INVALID_FIELD",
            f"{field}.{missing} is missing: a client's certificate and its key go together",
            field=f"{field}.{missing}",
        )
    settings: Settings = {}
    if tls.ca_file:
        settings["ssl.ca.location"] = tls.ca_file
    if tls.certificate_file:
        settings["ssl.certificate.location"] = tls.certificate_file
        settings["ssl.key.location"] = tls.key_file
    if tls.HasField("key_password"):
        settings["ssl.key.password"] = resolve(secrets, tls.key_password, f"{field}.key_password")
    return settings


def _sasl(sasl: sink_kafka_pb2.KafkaSasl, secrets: SecretResolver) -> Settings:
    field = f"{FIELD}.security.sasl"
    mechanism = _MECHANISMS.get(sasl.mechanism)
    if mechanism is None:
        raise UserError(
            "INVALID_FIELD", f"{field}.mechanism is missing", field=f"{field}.mechanism"
        )
    settings: Settings = {"sasl.mechanism": mechanism}
    by_token = mechanism == "OAUTHBEARER"
    for name, there, wanted in (
        ("username", bool(sasl.username), not by_token),
        ("password", sasl.HasField("password"), not by_token),
        ("oauth", sasl.HasField("oauth"), by_token),
    ):
        if there != wanted:
            what = "is missing" if wanted else "has no meaning"
            raise UserError(
                "INVALID_FIELD", f"{field}.{name} {what} with {mechanism}", field=f"{field}.{name}"
            )
    if not by_token:
        settings["sasl.username"] = sasl.username
        settings["sasl.password"] = resolve(secrets, sasl.password, f"{field}.password")
        return settings
    settings |= {
        "sasl.oauthbearer.method": "oidc",
        "sasl.oauthbearer.token.endpoint.url": sasl.oauth.token_url,
        "sasl.oauthbearer.client.id": sasl.oauth.client_id,
        "sasl.oauthbearer.client.secret": resolve(
            secrets, sasl.oauth.client_secret, f"{field}.oauth.client_secret"
        ),
    }
    if sasl.oauth.scope:
        settings["sasl.oauthbearer.scope"] = sasl.oauth.scope
    return settings


def message_timeout_ms(timeout_seconds: float) -> int:
    """How long the library may try to deliver a record of a write that may take `timeout_seconds`:
    at most three eighths of it, for encoding a batch takes time too on a busy machine. From a few
    values only, because it is fixed per producer.
    """
    return int(375 * 2 ** math.floor(math.log2(max(timeout_seconds, 0.25))))
