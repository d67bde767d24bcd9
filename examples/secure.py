"""`python -m examples.secure`: two controllers and two replicators with mutual TLS on every one of
their connections, by the files in deploy/examples/secure and an authority made for this run.

Two real Milvus stand on loopback; a collection is replicated, the controller that leads is killed,
the rows are proved equal, and callers without the right certificate or role are refused.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from pymilvus import DataType, MilvusClient

from tests.servers import Stack
from tests.servers.services import LEADER_LEASE_SECONDS, ControllerProcess, ReplicatorProcess
from tests.servers.trust_authority import Authority, Issued

FILES = Path(__file__).parents[1] / "deploy" / "examples" / "secure"
PLACE = "/etc/milvus-cdc"
PEOPLE = ("alice", "victor")
REPLICATORS = ("replicator-1", "replicator-2")
ROWS = 2_000
DIM = 8
PATIENCE_SECONDS = 90.0


class Failed(Exception):
    """Something was not as it has to be."""


class Secure:
    """The services of one run, beside a stack that runs; `with` starts and stops them."""

    def __init__(
        self,
        stack: Stack,
        folder: Path,
        *,
        source: Mapping[str, Any] | None = None,
        sink: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`source` and `sink` are laid over those of the task, as for connections that need
        credentials of their own; `environ` is more of the replicators' environment.
        """
        self.stack = stack
        self.folder = folder
        self.certificates = folder / "certificates"
        self.authority = Authority(self.certificates)
        self.issued = {
            name: self.authority.issue(name) for name in ("controllers", *REPLICATORS, *PEOPLE)
        }
        trusted = self.issued["controllers"].credentials
        place = {
            "endpoints": [stack.etcd.endpoint],
            "prefix": f"cdc-{uuid.uuid4()}",
            "leaseSeconds": LEADER_LEASE_SECONDS,
        }
        store = {"etcd": place}
        self.controllers = [
            ControllerProcess(
                folder,
                name=f"controller-{number}",
                credentials=trusted,
                store=store,
                **self._settings("controller.yaml"),
            )
            for number in (1, 2)
        ]
        addresses = [process.address for process in self.controllers]
        self.replicators = [
            ReplicatorProcess(
                folder, addresses, name, credentials=trusted, env=environ,
                **self._settings("replicator.yaml", name),
            )
            for name in REPLICATORS
        ]  # fmt: skip
        self._source = dict(source or {})
        self._sink = dict(sink or {})

    def _settings(self, file: str, name: str = REPLICATORS[0]) -> dict[str, Any]:
        """Those of the example, but for addresses and folder."""
        text = (FILES / file).read_text().replace(PLACE, str(self.certificates))
        settings: dict[str, Any] = yaml.safe_load(text.replace(REPLICATORS[0] + ".", name + "."))
        here = ("listen", "advertise", "metrics", "store", "controller", "name", "log")
        return {key: value for key, value in settings.items() if key not in here}

    def __enter__(self) -> Self:
        try:
            for process in (*self.controllers, *self.replicators):
                process.spawn()
            for process in (*self.controllers, *self.replicators):
                process.wait_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for process in (*self.replicators, *self.controllers):
            process.stop()

    def write_task(self, name: str, include: str) -> Path:
        source = {
            "etcd": {
                "endpoints": [self.stack.etcd.endpoint],
                "rootPath": self.stack.source.root_path,
            },
            "nats": {"url": self.stack.source.nats_url},
            "milvus": {"uri": self.stack.source.uri},
        }
        task = {
            "name": f"tasks/{name}",
            "source": source | self._source,
            "sink": {"milvus": {"uri": self.stack.sink.uri}} | self._sink,
            "selection": {"include": [include]},
            "start": {"earliest": {}},
        }
        file = self.folder / "task.yaml"
        file.write_text(yaml.safe_dump(task, sort_keys=False))
        return file

    def run(self, who: Issued | None, *arguments: str, at: int = 0) -> tuple[int, str]:
        """A `milvus-cdc` command by somebody at one of the controllers: exit code and output."""
        options: list[str] = []
        if who is not None:
            options = ["--ca-file", str(who.ca), "--certificate-file", str(who.certificate)]
            options += ["--key-file", str(who.key)]
        address = self.controllers[at].address
        environ = {k: v for k, v in os.environ.items() if not k.startswith("MILVUS_CDC_")}
        done = subprocess.run(
            [sys.executable, "-m", "milvus_cdc.cli.main", *arguments, *options,
             "--controller", address],
            capture_output=True, text=True, timeout=300, check=False,
            env=environ, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        shown = shlex.join(["milvus-cdc", *arguments])
        by = who.certificate.stem if who is not None else "nobody"
        print(f"\n{by}$ {shown}\n{done.stdout}{done.stderr}".rstrip(), flush=True)
        return done.returncode, done.stdout + done.stderr

    def prove(self, database: str) -> None:
        """Raises Failed."""
        client = MilvusClient(self.stack.source.uri, db_name=database)
        _create(client)
        _insert(client, 0)
        alice, victor = self.issued["alice"], self.issued["victor"]
        task = self.write_task("secure", f"{database}.*")
        _expect(self.run(victor, "task", "create", "-f", str(task)), 3, "ROLE_MISSING")
        _expect(self.run(alice, "task", "create", "-f", str(task)), 0)
        _expect(self.run(None, "task", "list", "--timeout", "5"), 4)
        self._verified(alice, 0)
        leader = self._leader()
        print(f"\nkill -9 {self.controllers[leader].pid}: the controller that leads is dead")
        self.controllers[leader].kill()
        _insert(client, 1)
        self._verified(alice, 1 - leader)
        _expect(self.run(victor, "replicator", "list", at=1 - leader), 0)
        client.close()

    def _leader(self) -> int:
        _, shown = self.run(self.issued["victor"], "controller", "list")
        for number, process in enumerate(self.controllers):
            if any(process.address in line and "LEADER" in line.upper()
                   for line in shown.splitlines()):  # fmt: skip
                return number
        raise Failed("nobody leads")

    def _verified(self, who: Issued, at: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            code, _ = self.run(who, "verify", "secure", at=at)
            if code == 0:
                return
            if time.monotonic() > deadline:
                raise Failed("source and sink were not equal in time")
            time.sleep(2)


def _expect(done: tuple[int, str], code: int, word: str = "") -> None:
    if done[0] != code or word not in done[1]:
        raise Failed(f"expected exit code {code} and {word!r}, got {done[0]}")


def _create(client: MilvusClient) -> None:
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="L2")
    client.create_collection("secrets", schema=schema, index_params=index)


def _insert(client: MilvusClient, part: int) -> None:
    rng = random.Random(part)
    rows = [
        {"id": part * ROWS + number, "vector": [rng.random() for _ in range(DIM)]}
        for number in range(ROWS)
    ]
    client.insert("secrets", rows)


def main() -> int:
    """Exit code 1 when something was not as it has to be; the logs stay then."""
    folder = Path(tempfile.mkdtemp(prefix="milvus-cdc-secure-"))
    stack = Stack(folder / "servers")
    failed = True
    try:
        print("Starting etcd, a source Milvus on its own NATS and a sink Milvus ...", flush=True)
        stack.start()
        root = MilvusClient(stack.source.uri)
        root.create_database("vault")
        root.close()
        print("Starting two controllers and two replicators with mutual TLS ...", flush=True)
        with Secure(stack, folder / "services") as services:
            services.prove("vault")
        failed = False
    except Failed as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
    finally:
        for server in reversed(stack.servers):
            server.stop(grace=2)
        if failed:
            print(f"logs: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if not failed:
        print("\nThe sink is equal to its source; every connection of the services was mutual TLS.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
