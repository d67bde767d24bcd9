"""A rolling upgrade: every process of both services is told to end and started as the next release,
one after the other, while rows flow; in the end every row is there once.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.load import SHAPES, Load
from tests.e2e.pauses import Pauses
from tests.e2e.test_controllers import Fleet
from tests.e2e.test_crashes import LOST_PEER
from tests.e2e.test_many_of_both import Many
from tests.e2e.wires import Wires
from tests.servers import Stack
from tests.servers.etcd import EtcdCluster
from tests.servers.logs import assert_quiet
from tests.servers.release import Release
from tests.servers.services import ControllerProcess, ReplicatorProcess

OLD, NEW = version("milvus-cdc"), "9.9.0"
OLD_PROTOCOL, NEW_PROTOCOL = 1, 2
AT_AN_ELECTION = (*LOST_PEER, "leads", "election")


class Upgrade:
    """Of all that runs in `services`, which go on answering."""

    def __init__(self, services: Fleet | Many, release: Release) -> None:
        self.services = services
        self.release = release
        self.upgraded: list[ControllerProcess | ReplicatorProcess] = []
        self.pauses: dict[str, float] = {}
        """The longest time without a row of one collection, by what was upgraded then."""

    def ask(self, what: str, call: Callable[[], Any], seconds: float = 90) -> Any:
        """Of a controller that runs, until there is an answer that is not false."""
        found: list[Any] = []

        def answered() -> bool:
            self.services.controller = next(c for c in self.services.controllers if c.running)
            found[:] = [call()]
            return bool(found[0])

        self.services.wait(what, answered, seconds)
        return found[0]

    def told(self, *words: str) -> list[dict[str, Any]]:
        """What the command shows, as JSON; empty while it gets no answer."""
        done = subprocess.run(
            [sys.executable, "-m", "milvus_cdc.cli.main", *words, "list", "-o", "json"],
            env=os.environ | {"MILVUS_CDC_CONTROLLER": self.services.controller.address},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        listed: list[dict[str, Any]] = []
        if done.returncode == 0:
            listed = json.loads(done.stdout)[f"{words[0]}s"]
        return listed

    def controllers(self) -> dict[str, str]:
        """Version by address, as `milvus-cdc controller list` shows it."""
        return {shown["address"]: shown["version"] for shown in self.told("controller")}

    def replicators(self) -> dict[str, str]:
        """Version by name, as `milvus-cdc replicator list` shows those that run."""
        return {
            shown["name"].removeprefix("replicators/"): shown["version"]
            for shown in self.told("replicator")
            if shown["state"] == "REPLICATOR_STATE_ALIVE"
        }

    def owned(self) -> dict[str, str]:
        return {a.name: a.replicator for a in self.services.assignments()}

    def one(self, process: ControllerProcess | ReplicatorProcess, pauses: Pauses) -> None:
        before = self.ask("assignments", self.owned)
        since = time.monotonic()
        process.stop()
        assert process.returncode == 0, process.log_tail()
        process.set_env(self.release.env)
        process.start()
        took = time.monotonic() - since
        self.upgraded.append(process)
        if isinstance(process, ControllerProcess):
            self.ask("listed", lambda: self.controllers().get(process.address) == NEW)
        else:
            self.ask("listed", lambda: self.replicators().get(process.name) == NEW)
        after = self.ask("all owned", lambda: all((found := self.owned()).values()) and found)
        assert after.keys() == before.keys(), "an assignment was lost"
        moved = sum(owner != before[name] for name, owner in after.items())
        if isinstance(process, ControllerProcess):
            assert not moved, "a controller's upgrade moved what replicators hold"
        time.sleep(1.0)
        waited = pauses.longest(since, time.monotonic())
        self.pauses[process.name] = max(waited.values())
        print(
            f"{process.name}: stopped and started in {took:.1f} s, {moved} of {len(after)} "
            f"assignments moved, longest pause of a collection {self.pauses[process.name]:.2f} s",
            flush=True,
        )


def protocols(process: ReplicatorProcess) -> list[int]:
    """Agreed upon with each controller that it met, in order."""
    return [int(n) for n in re.findall(r'"protocol": (\d+)', process.log_path.read_text())]


def upgrade_all(
    services: Fleet | Many, database: str, stack: Stack, release: Release, rows_max: int
) -> None:
    """One replicator first, then the controllers, then the other replicators: each kind of the old
    release meets the other one of the new.
    """
    load = Load(stack.source.uri, database, seed=9, pause_seconds=0.1, rows_max=rows_max)
    load.create()
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    upgrade = Upgrade(services, release)
    upgrade.ask("created", lambda: services.create(f"{database}.*"))
    load.start()
    services.wait_running(*names)
    first, *others = services.replicators
    assert set(upgrade.controllers().values()) == {OLD}
    assert set(upgrade.replicators().values()) == {OLD}
    with Pauses(services.replicators) as pauses:
        upgrade.one(first, pauses)
        assert protocols(first)[-1] == OLD_PROTOCOL, "the controllers are old"
        for controller in services.controllers:
            upgrade.one(controller, pauses)
        for other in others:
            assert set(protocols(other)) == {OLD_PROTOCOL}, "it is old"
            upgrade.one(other, pauses)
        for replicator in services.replicators:
            assert protocols(replicator)[-1] == NEW_PROTOCOL, "both sides are new"
    load.stop()
    shown = upgrade.ask("controllers", upgrade.controllers), upgrade.replicators()
    assert shown == (
        {c.address: NEW for c in services.controllers},
        {r.name: NEW for r in services.replicators},
    )
    services.wait_running(*names)
    rows = upgrade.ask("compared", services.prove)
    print(
        f"{len(upgrade.upgraded)} processes from {OLD} to {NEW} under load: {load.acknowledged} "
        f"rows acknowledged meanwhile, {rows} rows compared: missing 0, extra 0, different 0; "
        f"longest pause of a collection {max(upgrade.pauses.values()):.2f} s"
    )


def quiet(processes: Sequence[ControllerProcess | ReplicatorProcess], *allowed: str) -> None:
    for process in processes:
        assert_quiet(process.log_path, (*AT_AN_ELECTION, *allowed))


@pytest.mark.timeout(600)
def test_all_processes_are_upgraded_one_after_the_other(nats_stack: Stack, tmp_path: Path) -> None:
    release = Release(tmp_path / "release", NEW, protocol_max=NEW_PROTOCOL)
    with Fleet(nats_stack, tmp_path, f"upgrade-{random.random()}") as fleet:
        upgrade_all(fleet, "upgraded", nats_stack, release, 2_000)
        quiet((*fleet.controllers, *fleet.replicators))


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(3))
def test_many_of_both_are_upgraded_over_bad_connections(
    nats_stack: Stack, tmp_path: Path, round_: int
) -> None:
    """Three controllers and four replicators; the connections between them are late and break."""
    release = Release(tmp_path / "release", NEW, protocol_max=NEW_PROTOCOL)
    with (
        EtcdCluster(tmp_path / "etcd") as etcd,
        Wires(f"upgrade {round_}") as wires,
        Many(nats_stack, tmp_path, etcd, wires) as many,
    ):
        upgrade_all(many, f"upgraded_many_{round_}", nats_stack, release, 12_000)
        quiet((*many.controllers, *many.replicators))
