"""The page for Prometheus, over HTTP or HTTPS, in threads of its own.

Laws: who is slow or silent keeps nobody waiting and makes room for who comes later; files that
change count from the next connection on.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from milvus_cdc.errors import UserError
from milvus_cdc.trust.certificates import authorities, pair
from milvus_cdc.trust.settings import ServerTls
from milvus_cdc.trust.watched import Watched

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 32
"""At a time; with another one the oldest ends."""
SILENCE_SECONDS = 10.0
"""So long a connection may say nothing, or take nothing."""
_FIELDS = ("metricsTls.certificateFile", "metricsTls.keyFile", "metricsTls.clientCaFile")


class Scraping:
    """Serves one registry until `close`. Raises UserError ADDRESS_UNUSABLE, and FILE_UNREADABLE
    and CERTIFICATE_INVALID for files that cannot be used.
    """

    def __init__(
        self, address: str, tls: ServerTls | None = None, registry: CollectorRegistry = REGISTRY
    ) -> None:
        host, _, port = address.rpartition(":")
        contexts = None if tls is None else _contexts(tls)
        try:
            self._server = _Server(host.strip("[]"), int(port), contexts)
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                "ADDRESS_UNUSABLE",
                f"metrics: cannot listen on {address}: {error}",
                field="metrics",
            ) from error
        self._server.set_app(make_wsgi_app(registry))
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """A page that was asked for is no news."""


class _Server(ThreadingWSGIServer):
    """Shakes hands where it answers, never where it accepts: who does not go on with a handshake
    would keep everybody out.
    """

    request_queue_size = 128
    """A burst of connections is accepted at once; the default of 5 makes the others try again."""

    def __init__(self, host: str, port: int, contexts: Watched[ssl.SSLContext] | None) -> None:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )  # fmt: skip
        self.address_family, _, _, _, place = found[0]
        self._contexts = contexts
        self._open: dict[Any, socket.socket] = {}
        """By the peer's address, the oldest first."""
        self._lock = threading.Lock()
        super().__init__((str(place[0]), port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In the one thread that accepts."""
        context = self._contexts.get() if self._contexts is not None else None
        with self._lock:
            oldest = next(iter(self._open.values()), None)
            full = len(self._open) >= CONNECTIONS_MAX
            self._open[client_address] = request
        if full and oldest is not None:
            _end(oldest)
        work = threading.Thread(
            target=self._answer, args=(request, client_address, context), daemon=True
        )
        work.start()

    def _answer(
        self, request: socket.socket, client_address: Any, context: ssl.SSLContext | None
    ) -> None:
        try:
            request.settimeout(SILENCE_SECONDS)
            if context is not None:
                request = context.wrap_socket(
                    request, server_side=True, do_handshake_on_connect=False
                )
                with self._lock:
                    self._open[client_address] = request
                request.do_handshake()
            self.finish_request(request, client_address)
        except OSError as error:
            log.debug("a scrape came to nothing", peer=str(client_address), error=str(error))
        except Exception:
            log.exception("a scrape could not be answered", peer=str(client_address))
        finally:
            with self._lock:
                self._open.pop(client_address, None)
            self.shutdown_request(request)


def _end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has just ended by itself


def _contexts(tls: ServerTls) -> Watched[ssl.SSLContext]:
    files: list[tuple[str, Path]] = list(
        zip(_FIELDS, (tls.certificate_file, tls.key_file), strict=False)
    )
    if tls.client_ca_file is not None:
        files.append((_FIELDS[2], tls.client_ca_file))

    def parse(contents: Sequence[bytes]) -> ssl.SSLContext:
        pair(contents[0], contents[1], _FIELDS[:2])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if len(contents) > 2:
            trusted = authorities(contents[2], _FIELDS[2])
            context.load_verify_locations(cadata=trusted.decode("ascii", "ignore"))
            context.verify_mode = ssl.CERT_REQUIRED
        try:
            # The library takes files only. One replaced since is seen at the next look.
            context.load_cert_chain(tls.certificate_file, tls.key_file, password="")
        except (OSError, ValueError) as error:
            raise UserError(
                "CERTIFICATE_INVALID", f"{_FIELDS[0]}: {error}", field=_FIELDS[0]
            ) from error
        return context

    return Watched(files, parse)
