"""What everyone who talks to a source's Kafka shares: how its clients are made, and their errors.

Laws: a client that a broker refuses is given up, so that it does not go on trying; what it was made
with is read again for the next one, and only the refusal of what is there now is final.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from confluent_kafka import KafkaError, KafkaException

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.kafka_faults import LastFault
from milvus_cdc.kafka_security import FILES, Settings, blamed, security_settings
from milvus_cdc.secrets import NO_SECRETS, SecretResolver
from milvus_cdc.source import KafkaConfig

log = structlog.get_logger()

T = TypeVar("T")

SECURITY = "source.kafka.security"
OUT_OF_RANGE = frozenset((KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE))
FAULT_SECONDS = 10.0

_BLAMED = (
    (re.compile(r"verify failed|could not be verified"), "tls.ca_file"),
    (re.compile(r"alert.*(certificate|unknown ca|handshake)"), "tls.certificate_file"),
    (re.compile(r"oauth"), "sasl.oauth"),
    (re.compile(r"unsupported.*mechanism"), "sasl.mechanism"),
    (re.compile(r"sasl"), "sasl"),
    (re.compile(r"ssl|tls"), "tls"),
)


@dataclass(frozen=True, slots=True)
class Terms:
    """What one client was made with, and what was wrong with its connections since."""

    settings: Settings
    digest: bytes
    """Of all secrets, and of the content of all files, that the settings name."""
    fault: LastFault = field(default_factory=LastFault)


class Access:
    """The way to one source's brokers."""

    def __init__(self, config: KafkaConfig, secrets: SecretResolver | None) -> None:
        self._security = config.security
        self._secrets = secrets or NO_SECRETS
        self._brokers = ",".join(config.brokers)
        self.where = f"Kafka at {self._brokers}"

    def terms(self) -> Terms:
        """Blocking: read anew. Raises UserError, naming the field, for what cannot be used."""
        settings: Settings = {
            "bootstrap.servers": self._brokers,
            "client.id": "milvus-cdc",
            "reconnect.backoff.ms": 100,
            "reconnect.backoff.max.ms": 1000,
            "socket.keepalive.enable": True,
            "socket.timeout.ms": 10_000,
        }
        if self._security is not None:
            settings |= security_settings(self._security, self._secrets, SECURITY)
        digest = hashlib.sha256()
        for name, value in sorted(settings.items()):
            digest.update(f"{name}={value}\n".encode())
            if name in FILES:
                digest.update(_content(value))
        return Terms(settings, digest.digest())

    def made(self, make: Callable[[Settings], T], terms: Terms, **own: Any) -> T:
        """A client. Raises UserError INVALID_FIELD for files that the library cannot use."""
        try:
            return make({**terms.settings, "error_cb": terms.fault, **own})
        except KafkaException as error:
            text = str(error.args[0].str()).strip()
            place = blamed(text, SECURITY)
            raise UserError("INVALID_FIELD", f"{place}: {text}", field=place) from error

    def changed(self, terms: Terms) -> bool:
        """Whether a client made now would be made with something else."""
        return self.terms().digest != terms.digest

    @staticmethod
    def with_fault(text: str, terms: Terms) -> str:
        """What was asked for only ever runs out of time; why is said beside it, or not at all:
        a listener that wants TLS or a login just ends a connection without.
        """
        fault = terms.fault.since(time.monotonic() - FAULT_SECONDS)
        why = f"does this listener want {SECURITY}?" if fault is None else fault.str()
        return f"{text} ({why})"

    def refused(self, terms: Terms, error: KafkaError) -> CdcError:
        """What it means that a broker refuses a client made with `terms`: raise it."""
        if self.changed(terms):
            return RetryableError(
                "QUEUE_UNREACHABLE",
                f"{self.where}: {error.str()}; secrets or certificates have changed meanwhile, "
                "connecting anew",
            )
        text = error.str().lower()
        place = next((f".{place}" for form, place in _BLAMED if form.search(text)), "")
        return UserError(
            "QUEUE_AUTHENTICATION_FAILED",
            f"{self.where}: {error.str()}; check {SECURITY}{place} and what the broker expects",
            field=f"{SECURITY}{place}",
        )


class ClientLog:
    """Where the client's own log lines go; what matters of them also comes as an error."""

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def log(self, level: int, text: str, *args: Any) -> None:
        log.debug("kafka client", topic=self._topic, level=level, line=text % args)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return hashlib.sha256(stream.read()).digest()
    except OSError:
        return b""
