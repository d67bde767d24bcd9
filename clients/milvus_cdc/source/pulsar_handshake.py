"""Begins a connection with a broker by hand, to learn why the client's does not come about.

The client tells a refused login, and a certificate it does not trust, as a timeout.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct

from google.protobuf.message import DecodeError
from milvuscdc.internal.pulsar_wire_pb2 import BaseCommand, CommandConnect, CommandLookupTopic

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.source import PulsarConfig
from milvus_cdc.source.pulsar_oauth import renewed
from milvus_cdc.source.pulsar_tls import tls_context

SECONDS = 5.0
_CONNECT, _CONNECTED, _ERROR, _LOOKUP, _LOOKUP_ANSWER = 2, 3, 14, 23, 24
_AUTHENTICATION, _AUTHORIZATION = 3, 4
_PROTOCOL_VERSION = 19
_FRAME_MAX = 5 * 2**20
_WHAT = {
    "source.pulsar.oauth": "the identity provider's token",
    "source.pulsar.token": "the token",
    "source.pulsar.tls": "the client's certificate",
    "": "access without a token",
}
"""By the field of the login."""


def diagnose(config: PulsarConfig, topic: str = "") -> CdcError | None:
    """Blocking: why there is no connection or no access to `topic`; None when there is both, or a
    token of an identity provider had to be fetched anew. Raises as the token and the files do.
    """
    found = _diagnose(config, topic)
    if isinstance(found, UserError) and renewed(config.token):
        return _diagnose(config, topic)
    return found


def _diagnose(config: PulsarConfig, topic: str) -> CdcError | None:
    scheme, _, hosts = config.service_url.partition("://")
    found: CdcError | None = None
    for address in hosts.split(","):
        host, _, port = address.rpartition(":")
        try:
            return _shake(config, host.strip("[]"), int(port), scheme == "pulsar+ssl", topic)
        except (ssl.SSLError, ConnectionError, OSError, DecodeError, EOFError) as error:
            found = _trouble(f"Pulsar at {scheme}://{address}", error)
            if isinstance(found, UserError):
                return found
    return found


def _shake(config: PulsarConfig, host: str, port: int, tls: bool, topic: str) -> CdcError | None:
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(socket.create_connection((host, port), SECONDS))
        if tls:
            wrapped = tls_context(config).wrap_socket(stream, server_hostname=host)
            stream = opened.enter_context(wrapped)
        _send(stream, BaseCommand(type=_CONNECT, connect=_login(config)))
        answer = _receive(stream, (_CONNECTED, _ERROR))
        if answer.type == _ERROR:
            return _refusal(config, answer.error.error, answer.error.message)
        if topic:
            lookup = CommandLookupTopic(topic=topic, request_id=1)
            _send(stream, BaseCommand(type=_LOOKUP, lookupTopic=lookup))
            answer = _receive(stream, (_LOOKUP_ANSWER, _ERROR))
            found = answer.lookupTopicResponse
            if answer.type == _LOOKUP_ANSWER and found.HasField("error"):
                return _refusal(config, found.error, found.message)
    return None


def _login(config: PulsarConfig) -> CommandConnect:
    connect = CommandConnect(client_version="milvus-cdc", protocol_version=_PROTOCOL_VERSION)
    if config.token is not None:
        connect.auth_method_name, connect.auth_data = "token", config.token().encode()
    elif config.tls is not None and config.tls.certificate_file:
        connect.auth_method_name = "tls"
    return connect


def denied(config: PulsarConfig, said: str) -> UserError:
    """Access refused by the broker."""
    field = config.login_field
    return UserError(
        "QUEUE_ACCESS_DENIED",
        f"Pulsar at {config.service_url} refuses {_WHAT[field]}: {said.strip()}; a role that may "
        f"consume in {config.tenant}/{config.namespace} is needed",
        field=field or "source.pulsar.token",
    )


def _refusal(config: PulsarConfig, error: int, message: str) -> CdcError:
    if error in (_AUTHENTICATION, _AUTHORIZATION):
        return denied(config, message)
    return RetryableError("QUEUE_UNREACHABLE", f"Pulsar at {config.service_url}: {message}")


def _trouble(where: str, error: Exception) -> CdcError:
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return UserError(
            "QUEUE_TLS_FAILED",
            f"{where}: {error}; check the files of authorities and certificate",
            field="source.pulsar.tls",
        )
    return RetryableError("QUEUE_UNREACHABLE", f"{where}: {str(error) or type(error).__name__}")


def _send(stream: socket.socket, command: BaseCommand) -> None:
    body = command.SerializeToString()
    stream.sendall(struct.pack(">II", len(body) + 4, len(body)) + body)


def _receive(stream: socket.socket, types: tuple[int, ...]) -> BaseCommand:
    """The next command of one of these types; others (pings) are passed over."""
    while True:
        total, size = struct.unpack(">II", _exactly(stream, 8))
        if not 4 <= total <= _FRAME_MAX or size > total - 4:
            raise DecodeError("that is no frame of Pulsar's protocol")
        command = BaseCommand.FromString(_exactly(stream, total - 4)[:size])
        if command.type in types:
            return command


def _exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            raise EOFError("it closed the connection without an answer")
        data += part
    return data
