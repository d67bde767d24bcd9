"""What a Kafka client says is wrong with its connections, which its answers do not tell."""

from __future__ import annotations

import re
import time
from collections import deque

from confluent_kafka import KafkaError

from milvus_cdc.kafka_codes import AUTHENTICATION

_FINAL = re.compile(
    r"\b(invalid_client|invalid_grant|unauthorized_client|invalid_scope|access_denied)\b"
)
"""An identity provider's answers that no repetition changes (RFC 6749, 5.2)."""

_ALERT = re.compile(r"ssl/tls alert|SSL alert number")
"""A broker that does not take our certificate says so after the handshake, and the library takes it
for a broken connection.
"""
_GONE = re.compile(r"Disconnected|connection reset|closed by peer", re.IGNORECASE)
"""And it takes a peer that went away, or a proxy without a broker behind it, for failed TLS."""


class LastFault:
    """What a client last said was wrong with its connections; it is its `error_cb`.

    The library goes on trying whatever happens and only ever reports that time ran out; a login
    that a broker refuses shows up here alone. A broker that goes down in the middle of a login
    looks the same, but only once.
    """

    def __init__(self) -> None:
        self._error: KafkaError | None = None
        self._refusals: deque[float] = deque(maxlen=2)
        self._at = 0.0

    def __call__(self, error: KafkaError) -> None:
        # That all brokers are down is said after each of the reasons why.
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            return
        if error.code() == KafkaError._SSL and _GONE.search(error.str()):
            error = KafkaError(KafkaError._TRANSPORT, error.str())
        elif _ALERT.search(error.str()):
            error = KafkaError(KafkaError._SSL, error.str())
        self._error = error
        self._at = time.monotonic()
        if error.code() in AUTHENTICATION:
            self._refusals.append(self._at)
            if _FINAL.search(error.str()):
                self._refusals.append(self._at)
        else:
            self._refusals.clear()

    def since(self, moment: float) -> KafkaError | None:
        """The last one, if it was said after `moment` (`time.monotonic`)."""
        error = self._error
        if error is None or self._at < moment:
            return None
        refused = len(self._refusals) > 1 and self._refusals[0] >= moment
        if error.code() in AUTHENTICATION and not refused:
            return KafkaError(KafkaError._TRANSPORT, error.str())
        return error

    def refusal(self, moment: float) -> KafkaError | None:
        """A refused login or certificate that was the last thing said, and after `moment`."""
        error = self.since(moment)
        return error if error is not None and error.code() in AUTHENTICATION else None
