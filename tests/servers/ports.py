"""Loopback ports for test servers: free when given out, and kept by us for our lifetime.

A port below the kernel's ephemeral range cannot be taken by an outgoing connection. A lock file
per port (released by the kernel when this process ends, however it ends) keeps two test runs on
one machine apart, also while a server of ours is down between kill and restart and the bind test
would call its port free.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
import threading
from pathlib import Path

import psutil

FIRST_PORT = 20_000
LAST_PORT = 32_000

_mutex = threading.Lock()
_locks: dict[int, int] = {}  # port -> descriptor of its locked file, open until we exit
_random = random.Random(os.urandom(8))


def free_port() -> int:
    """A port nobody listens on; never given out again by this process or a concurrent one."""
    with _mutex:
        for _ in range(2_000):
            port = _random.randrange(FIRST_PORT, LAST_PORT)
            if port in _locks or not _lock(port):
                continue
            if can_listen(port):
                return port
            os.close(_locks.pop(port))
    raise RuntimeError(f"no free port between {FIRST_PORT} and {LAST_PORT}")


def can_listen(port: int) -> bool:
    """Every interface, because Milvus listens on every interface for some of its ports."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a server that has ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def listening_ports(pid: int) -> set[int]:
    """The TCP ports process `pid` listens on.

    A server that was asked to stop may stay, hold its ports and answer in the place of its
    successor; whoever waits for a server to come up has to ask who answers.
    """
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return set()
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def _lock(port: int) -> bool:
    folder = Path(tempfile.gettempdir()) / f"milvus-cdc-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / str(port), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    _locks[port] = descriptor
    return True
