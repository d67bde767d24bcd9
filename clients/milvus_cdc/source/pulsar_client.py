"""Pulsar's client as a source uses it, and what its errors mean.

Laws: the client tries again for ever by itself and says little of why; whoever meets its trouble
asks `trouble`, which finds out. What it calls does not raise: that would end the process.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable
from typing import Any

import pulsar
import structlog

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.source import PulsarConfig
from milvus_cdc.source.pulsar_admin import missing
from milvus_cdc.source.pulsar_handshake import denied, diagnose
from milvus_cdc.source.pulsar_oauth import renewed
from milvus_cdc.source.pulsar_tls import tls_context

log = structlog.get_logger()

OPERATION_SECONDS = 8
CONNECT_MS = 5_000
HELD_MESSAGES = 32
"""What the client may hold ahead of a reader: few, for a message may have 5 MiB."""
MESSAGE_MS = 10_000
"""How long a message that is known to be there may take."""


class PulsarConnection:
    """One client, shared by the readers of a source; blocking, made on first use."""

    def __init__(self, config: PulsarConfig) -> None:
        self.config = config
        self._client: pulsar.Client | None = None
        self._made = threading.Lock()

    def topic(self, pchannel: str) -> str:
        return f"persistent://{self.config.tenant}/{self.config.namespace}/{pchannel}"

    def reader(self, pchannel: str, start: pulsar.MessageId, *, held: int = 1) -> pulsar.Reader:
        """Its first message is the one at `start`, or what follows it if there is none. Raises as
        the token does.
        """
        try:
            return self._get().create_reader(
                self.topic(pchannel),
                start,
                reader_name="milvus-cdc",
                receiver_queue_size=held,
                start_message_id_inclusive=True,
            )
        except pulsar.PulsarException as error:
            raise self.trouble(error, pchannel) from error

    def consumer(self, pchannel: str, subscription: str) -> pulsar.Consumer:
        """Of a durable subscription, which is made at the oldest message there is where it is
        missing. It gets no messages; others may be connected beside it. PulsarException, and as
        the token raises.
        """
        return self._get().subscribe(
            self.topic(pchannel),
            subscription,
            consumer_type=pulsar.ConsumerType.Failover,
            initial_position=pulsar.InitialPosition.Earliest,
            receiver_queue_size=0,
        )

    def trouble(self, error: BaseException | None, pchannel: str = "") -> CdcError:
        """Blocking: what is behind an error of the client, or behind its silence. What keeps the
        token from being known is raised.
        """
        config = self.config
        said = str(error or "no connection")
        if config.token is not None:
            config.token()  # the client only says that there was no access
        refused = isinstance(error, pulsar.AuthenticationError | pulsar.AuthorizationError)
        if refused and not renewed(config.token):
            return denied(config, said)
        if isinstance(error, pulsar.TopicNotFound):
            return missing(pchannel, f"Pulsar at {config.service_url}")
        found = diagnose(config, self.topic(pchannel) if pchannel else "")
        if isinstance(found, UserError):
            return found
        return found or RetryableError(
            "QUEUE_UNREACHABLE", f"Pulsar at {config.service_url}: {said}"
        )

    def probe(self) -> None:
        """Whether a broker is there and takes the login; raises what is wrong."""
        if (found := diagnose(self.config)) is not None:
            raise found

    def close(self) -> None:
        with self._made:
            client, self._client = self._client, None
        if client is not None:
            try:
                client.close()
            except pulsar.PulsarException:
                client.shutdown()

    def _get(self) -> pulsar.Client:
        if self.config.token is not None:
            self.config.token()  # raises here what could not be raised below the client
        with self._made:
            if self._client is None:
                self._client = pulsar.Client(self.config.service_url, **self._settings())
            return self._client

    def _settings(self) -> dict[str, Any]:
        config, tls = self.config, self.config.tls
        settings: dict[str, Any] = {
            "operation_timeout_seconds": OPERATION_SECONDS,
            "connection_timeout_ms": CONNECT_MS,
            # It would write to the standard output; what matters comes as an error.
            "logger": pulsar.FileLogger(pulsar.LoggerLevel.Error, os.devnull),
        }
        if config.service_url.startswith("pulsar+ssl://"):
            tls_context(config)  # tells a bad file better than the client
            settings["tls_validate_hostname"] = True
            authorities = tls.ca_file if tls else ""
            settings["tls_trust_certs_file_path"] = (
                authorities or ssl.get_default_verify_paths().cafile
            )
            if tls is not None and tls.certificate_file:
                settings["tls_certificate_file_path"] = tls.certificate_file
                settings["tls_private_key_file_path"] = tls.key_file
        if config.token is not None:
            settings["authentication"] = pulsar.AuthenticationToken(_Supplier(config.token))
        elif tls is not None and tls.certificate_file:
            settings["authentication"] = pulsar.AuthenticationTLS(
                tls.certificate_file, tls.key_file
            )
        return settings


class _Supplier:
    """A token for the client. While there is none, the one from before, or an empty one: brokers
    refuse it, and `trouble` says why. An error raised here when a broker wants a new token for an
    open connection would go through the client's own thread and abort the process.
    """

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token
        self._given = ""

    def __call__(self) -> str:
        try:
            self._given = self._token()
        except Exception as error:
            log.debug("no token for Pulsar's client", error=str(error))
        return self._given
