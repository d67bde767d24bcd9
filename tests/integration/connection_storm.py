"""`python -m tests.integration.connection_storm ADDRESS CA CERTIFICATE KEY`: new connections to a
gRPC server with mutual TLS at a pace, as long as the machine keeps it; prints what was seen.

A process of its own, so that its handshakes cost the server's process nothing but the server's.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

HANDSHAKES = 1_000
PER_SECOND = 100
HALF_OPEN_EVERY, REFUSED_EVERY = 5, 20
HALF_OPEN_KEPT = 100
THREADS = 16
PATIENCE_SECONDS = 60.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_HELLO_BEGUN = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


class Storm:
    """Whole connections, some of them cut off; some that stay half-open; some without a
    certificate.
    """

    def __init__(self, address: str, ca: str, certificate: str, key: str) -> None:
        host, _, port = address.rpartition(":")
        self._place = host, int(port)
        self._nobody = _context(ca)
        self._known = _context(ca)
        self._known.load_cert_chain(certificate, key)
        self._half_open: deque[socket.socket] = deque()
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()

    def run(self) -> dict[str, float]:
        began = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            work = []
            for number in range(HANDSHAKES):
                time.sleep(max(0.0, began + number / PER_SECOND - time.monotonic()))
                work.append(pool.submit(self._whole, number % 2 == 1))
                if number % HALF_OPEN_EVERY == 0:
                    work.append(pool.submit(self._half, number % 2 == 1))
                if number % REFUSED_EVERY == 0:
                    work.append(pool.submit(self._refused))
            for done in work:
                done.result()
        seconds = time.monotonic() - began
        for one in self._half_open:
            one.close()
        return {**self._seen, "seconds": round(seconds, 2)}

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._place, timeout=PATIENCE_SECONDS)

    def _count(self, what: str) -> None:
        with self._lock:
            self._seen[what] += 1

    def _whole(self, abrupt: bool) -> None:
        """Up to the server's first frame: both sides are through with the handshake."""
        with self._known.wrap_socket(self._connect(), server_hostname=self._place[0]) as one:
            one.sendall(_PREFACE)
            assert one.recv(9)
            self._count("handshakes")
            if not abrupt:
                with contextlib.suppress(OSError):
                    one.unwrap()

    def _half(self, begun: bool) -> None:
        one = self._connect()
        if begun:
            one.sendall(_HELLO_BEGUN)
        self._count("half_open")
        with self._lock:
            self._half_open.append(one)
            oldest = self._half_open.popleft() if len(self._half_open) > HALF_OPEN_KEPT else None
        if oldest is not None:
            oldest.close()

    def _refused(self) -> None:
        try:
            with self._nobody.wrap_socket(self._connect(), server_hostname=self._place[0]) as one:
                one.sendall(_PREFACE)
                let_in = one.recv(9) != b""
        except OSError:
            let_in = False
        self._count("let_in_without_a_certificate" if let_in else "refused")


def _context(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    return context


if __name__ == "__main__":
    print(json.dumps(Storm(*sys.argv[1:]).run()))
