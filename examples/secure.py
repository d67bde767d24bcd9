"""`python -m examples.secure`: two Milvus with etcd and queue, two controllers and two replicators,
mutual TLS on every connection of theirs: by the files in deploy/examples/secure and an authority
made for this run.

A collection is replicated, callers without the right certificate or role are refused at each
connection, the controller that leads is killed, and the rows are proved equal.
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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import yaml
from pymilvus import DataType, MilvusClient

from examples.hops import AS_IT_SHOULD_BE, HTTP, NATS, Hop, shown, table
from tests.servers import Authority, ManagedProcess, Pair, ServerStartError
from tests.servers.ensemble import Ensemble
from tests.servers.secured import SecuredStack
from tests.servers.services import LEADER_LEASE_SECONDS, ControllerProcess, ReplicatorProcess

FILES = Path(__file__).parents[1] / "deploy" / "examples" / "secure"
PLACE = "/etc/milvus-cdc"
PEOPLE = ("alice", "victor", "application", "prometheus")
REPLICATORS = ("replicator-1", "replicator-2")
ROWS = 2_000
DIM = 8
PATIENCE_SECONDS = 90.0


class Failed(Exception):
    """Something was not as it has to be."""


class Secure(Ensemble):
    """The services of one run, beside a stack that runs."""

    def __init__(self, stack: SecuredStack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        authority = stack.authority
        self.certificates = authority.ca_file.parent
        self.issued = {name: authority.server(name) for name in ("controllers", *REPLICATORS)}
        self.issued |= {name: authority.issue(name) for name in ("replicators", *PEOPLE)}
        self.stranger = Authority(folder / "stranger", "another-authority").issue("alice")
        own = self.issued["controllers"]
        asking = grpc.ssl_channel_credentials(
            authority.ca_file.read_bytes(), own.key.read_bytes(), own.certificate.read_bytes()
        )
        settings = self._settings("controller.yaml")
        settings["store"]["etcd"] |= {
            "endpoints": [stack.etcd.endpoint],
            "prefix": f"cdc-{uuid.uuid4()}",
            "leaseSeconds": LEADER_LEASE_SECONDS,
        }
        self.controllers = [
            ControllerProcess(folder, name=f"controller-{n}", credentials=asking, **settings)
            for n in (1, 2)
        ]
        addresses = [process.address for process in self.controllers]
        self.replicators = [
            ReplicatorProcess(
                folder, addresses, name, credentials=asking,
                **self._settings("replicator.yaml", name),
            )
            for name in REPLICATORS
        ]  # fmt: skip

    def _settings(self, file: str, name: str = REPLICATORS[0]) -> dict[str, Any]:
        """Those of the example, but for addresses and folder."""
        text = (FILES / file).read_text().replace(PLACE, str(self.certificates))
        # Its certificate and key, and not its name among those of others.
        text = text.replace(f"/{REPLICATORS[0]}", f"/{name}")
        settings: dict[str, Any] = yaml.safe_load(text)
        here = ("listen", "advertise", "metrics", "controller", "name", "log")
        return {key: value for key, value in settings.items() if key not in here}

    def hops(self) -> list[Hop]:
        """Every connection there is, with the certificate that is shown there."""
        of, stack = self.issued, self.stack
        one, two = (process.address for process in self.controllers)
        return [
            Hop("user -> controller", one, of["alice"]),
            Hop("replicator -> controller", two, of["replicator-1"]),
            Hop("controller -> controller", one, of["controllers"]),
            Hop("controller -> its etcd", stack.etcd.endpoint, of["controllers"]),
            Hop("controller -> source's etcd", stack.etcd.endpoint, of["controllers"]),
            Hop("Milvus -> etcd", stack.etcd.endpoint, stack.of_milvus),
            Hop("replicator -> source's queue", stack.queue.address, of["replicators"], NATS),
            Hop("replicator -> source Milvus", stack.source.address, of["replicators"]),
            Hop("replicator -> sink Milvus", stack.sink.address, of["replicators"]),
            Hop("application -> source Milvus", stack.source.address, of["application"]),
            Hop("health -> replicator", self.replicators[0].address, of["victor"]),
            *(
                Hop(
                    f"metrics -> {process.name}",
                    urlsplit(process.metrics_url).netloc,
                    of["prometheus"],
                    HTTP,
                )
                for process in (self.controllers[0], self.replicators[0])
            ),
        ]

    @property
    def servers(self) -> tuple[ManagedProcess, ...]:
        return (*self.controllers, *self.replicators)

    def write_task(self, include: str) -> Path:
        text = (FILES / "task.yaml").read_text().replace(PLACE, str(self.certificates))
        task = yaml.safe_load(text)
        source, sink = task["source"], task["sink"]
        source["etcd"] |= {
            "endpoints": [self.stack.etcd.endpoint],
            "rootPath": self.stack.source.root_path,
        }
        source["nats"]["url"] = self.stack.queue_url
        source["milvus"]["uri"] = self.stack.source.uri
        sink["milvus"]["uri"] = self.stack.sink.uri
        task["selection"] = {"include": [include]}
        file = self.folder / "task.yaml"
        file.write_text(yaml.safe_dump(task, sort_keys=False))
        return file

    def run(self, who: Pair | None, *arguments: str, at: int = 0) -> tuple[int, str]:
        """A `milvus-cdc` command by somebody at one of the controllers: exit code and output."""
        options = ["--ca-file", str(self.stack.authority.ca_file)]
        if who is not None:
            options += ["--certificate-file", str(who.certificate), "--key-file", str(who.key)]
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
        alice, victor, application = (self.issued[name] for name in PEOPLE[:3])
        root = self.stack.connect(self.stack.source, application)
        root.create_database(database)
        root.close()
        client = self.stack.connect(self.stack.source, application, database)
        _create(client)
        _insert(client, 0)
        task = self.write_task(f"{database}.*")
        _expect(self.run(victor, "task", "create", "-f", str(task)), 3, "ROLE_MISSING")
        _expect(self.run(alice, "task", "create", "-f", str(task)), 0)
        _expect(self.run(None, "task", "list", "--timeout", "5"), 4)
        self._verified(alice, 0)
        self.show_who_is_refused()
        leader = self._leader()
        print(f"\nkill -9 {self.controllers[leader].pid}: the controller that leads is dead")
        self.controllers[leader].kill()
        _insert(client, 1)
        self._verified(alice, 1 - leader)
        _expect(self.run(victor, "replicator", "list", at=1 - leader), 0)
        client.close()

    def show_who_is_refused(self) -> None:
        """Raises Failed."""
        lines = table(self.hops(), self.stack.authority.ca_file, self.stranger)
        print(f"\nWho is let through, by what he shows:\n{shown(lines)}", flush=True)
        for name, *cells in lines:
            if tuple(cells) != AS_IT_SHOULD_BE:
                raise Failed(f"{name} is not as it should be")

    def _leader(self) -> int:
        _, shown = self.run(self.issued["victor"], "controller", "list")
        for number, process in enumerate(self.controllers):
            if any(process.address in line and "LEADER" in line.upper()
                   for line in shown.splitlines()):  # fmt: skip
                return number
        raise Failed("nobody leads")

    def _verified(self, who: Pair, at: int) -> None:
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
    failed = True
    try:
        print(f"An authority and certificates by it: {folder / 'certificates'}")
        authority = Authority(folder / "certificates")
        print(
            "Starting etcd, a source Milvus, its queue's side-car and a sink Milvus ...", flush=True
        )
        with SecuredStack(folder / "servers", authority) as stack:
            print("Starting two controllers and two replicators ...", flush=True)
            with Secure(stack, folder / "services") as services:
                services.prove("vault")
        failed = False
    except (Failed, ServerStartError) as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
    finally:
        if failed:
            print(f"logs: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if not failed:
        print("\nThe sink is equal to its source, and nobody came through without a certificate.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
