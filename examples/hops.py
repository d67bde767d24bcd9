"""Who is let through a door: with a certificate, without one, with a stranger's, without TLS."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers import Pair

SECONDS = 10.0
_SETTINGS = 4


@dataclass(frozen=True, slots=True)
class Protocol:
    """`first` is what a client says, and `answer` at `offset` of what the server says shows that it
    is listened to.
    """

    first: bytes
    answer: bytes
    offset: int = 0
    offers: tuple[str, ...] = ()


HTTP2 = Protocol(
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0",
    bytes([_SETTINGS]),
    offset=3,
    offers=("h2",),
)
"""gRPC."""
HTTP = Protocol(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 200 ", offset=8)
NATS = Protocol(b"PING\r\n", b"INFO ")


@dataclass(frozen=True, slots=True)
class Hop:
    """`own` is the certificate that is really shown there."""

    name: str
    address: str
    own: Pair
    protocol: Protocol = HTTP2


def trusting(ca_file: Path, own: Pair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


def answered(address: str, protocol: Protocol, tls: ssl.SSLContext | None) -> bool:
    """False when the server ends the connection or says something else. Raises OSError when nobody
    listens there, and ssl.SSLCertVerificationError when the server is not who it should be.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), SECONDS) as plain:
        try:
            if tls is None:
                return _listens(plain, protocol)
            tls.set_alpn_protocols(list(protocol.offers))
            with tls.wrap_socket(plain, server_hostname=host) as secured:
                return _listens(secured, protocol)
        except ssl.SSLCertVerificationError:
            raise
        except (ssl.SSLError, ConnectionError):
            return False


def _listens(connection: socket.socket, protocol: Protocol) -> bool:
    connection.sendall(protocol.first)
    said, needed = b"", protocol.offset + len(protocol.answer)
    while len(said) < needed:
        more = connection.recv(4096)
        if not more:
            return False
        said += more
    return said[protocol.offset : needed] == protocol.answer


def table(hops: Sequence[Hop], ca_file: Path, stranger: Pair) -> list[tuple[str, ...]]:
    """A line for each: its name, then `ok` or `refused` with the own certificate, without one, with
    one of another authority and without TLS.
    """
    lines = []
    for hop in hops:
        ways = [trusting(ca_file, own) for own in (hop.own, None, stranger)]
        cells = [answered(hop.address, hop.protocol, tls) for tls in (*ways, None)]
        lines.append((hop.name, *("ok" if through else "refused" for through in cells)))
    return lines


HEAD = ("connection", "certificate", "without", "a stranger's", "no TLS")
AS_IT_SHOULD_BE = ("ok", "refused", "refused", "refused")


def shown(lines: Sequence[tuple[str, ...]]) -> str:
    rows = [HEAD, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
