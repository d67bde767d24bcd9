"""How to connect to a Kafka, as settings of librdkafka: the same for who reads and who writes.

Laws: secrets come by reference only, and are resolved when a client is made; `field` is the place
of the `KafkaSecurity` in the task, and what is wrong is named below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Producer
from milvuscdc.v1 import sink_kafka_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver, resolve

log = structlog.get_logger()

Settings = dict[str, Any]

FILES = ("ssl.ca.location", "ssl.certificate.location", "ssl.key.location")
"""Settings that name a file, which a client reads when it is made and never again."""

_MECHANISMS = {
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN: "PLAIN",
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_256: "SCRAM-SHA-256",
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_SCRAM_SHA_512: "SCRAM-SHA-512",
    sink_kafka_pb2.KAFKA_SASL_MECHANISM_OAUTHBEARER: "OAUTHBEARER",
}
_PLACES: Mapping[str, str] = {
    "ssl.ca.location": "tls.ca_file",
    "ssl.certificate.location": "tls.certificate_file",
    "ssl.key": "tls.key_file",
    "oauthbearer": "sasl.oauth",
    "sasl": "sasl",
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


def security_settings(
    security: sink_kafka_pb2.KafkaSecurity, secrets: SecretResolver, field: str
) -> Settings:
    """Raises UserError for what does not go together and for secrets that cannot be used."""
    tls, sasl = security.HasField("tls"), security.HasField("sasl")
    settings: Settings = {
        "security.protocol": ("SASL_" if sasl else "") + ("SSL" if tls else "PLAINTEXT")
    }
    if tls:
        settings |= _tls(security.tls, secrets, f"{field}.tls")
    if sasl:
        settings |= _sasl(security.sasl, secrets, f"{field}.sasl")
    return settings


def refused(settings: Settings) -> str | None:
    """Why librdkafka does not take them; connects to nothing as long as no broker is among them."""
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


def blamed(text: str, field: str) -> str:
    """The part of the security that librdkafka complains about in `text`."""
    found = next((place for name, place in _PLACES.items() if name in text), "")
    return field + (f".{found}" if found else "")


def _tls(tls: sink_kafka_pb2.KafkaTls, secrets: SecretResolver, field: str) -> Settings:
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


def _sasl(sasl: sink_kafka_pb2.KafkaSasl, secrets: SecretResolver, field: str) -> Settings:
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
