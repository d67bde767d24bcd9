"""Three controllers between real Milvus servers: rows go on while another one is elected, and
everything is equal at the end.
"""

from __future__ import annotations

import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from milvuscdc.v1 import fleet_service_pb2, fleet_service_pb2_grpc

from tests.e2e.load import SHAPES, Load
from tests.e2e.pair import Pair
from tests.e2e.pauses import spread
from tests.e2e.test_crashes import LOST_PEER
from tests.servers import Stack
from tests.servers.logs import assert_quiet
from tests.servers.services import ControllerProcess, ReplicatorProcess

LEASE_SECONDS = 5
"""The default, with the default lease of replicators: 15 s."""
FAIL_OVER_SECONDS = LEASE_SECONDS + 3
LEADER = fleet_service_pb2.CONTROLLER_ROLE_LEADER


class Fleet(Pair):
    """Three controllers and two replicators that know them all. `controller` is the one the test
    talks to.
    """

    def __init__(self, stack: Stack, folder: Path, prefix: str) -> None:
        super().__init__(stack, folder, replicators=0)
        settings: dict[str, Any] = {
            "store": {
                "etcd": {
                    "endpoints": [stack.etcd.endpoint],
                    "prefix": prefix,
                    "leaseSeconds": LEASE_SECONDS,
                }
            },
            "lease": {"ttl": 15, "heartbeat": 3, "clockMargin": 2},
        }
        self.controllers = [
            ControllerProcess(folder, name=f"controller-{n}", **settings) for n in range(3)
        ]
        self.controller = self.controllers[0]
        addresses = [controller.address for controller in self.controllers]
        for n in range(2):
            # One begins at the first controller, the other at the last.
            order = addresses if n == 0 else addresses[::-1]
            self.replicators.append(ReplicatorProcess(folder, order, f"replicator-{n}"))

    def __enter__(self) -> Fleet:
        for controller in self.controllers:
            controller.spawn()
        for controller in self.controllers:
            controller.wait_ready()
        for replicator in self.replicators:
            replicator.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.replicators, *self.controllers):
            process.stop()

    def leader(self, *but: ControllerProcess, seconds: float = 30) -> ControllerProcess:
        """The one that leads and answers, once there is one; not one of `but`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process in self.controllers:
                if process in but or not process.running:
                    continue
                channel = grpc.insecure_channel(
                    process.address, options=[("grpc.use_local_subchannel_pool", 1)]
                )
                with channel:
                    stub = fleet_service_pb2_grpc.FleetServiceStub(channel)
                    try:
                        listing = fleet_service_pb2.ListControllersRequest()
                        known = stub.ListControllers(listing, timeout=1).controllers
                        if (process.address, LEADER) not in [(c.address, c.role) for c in known]:
                            continue
                        stub.ListReplicators(fleet_service_pb2.ListReplicatorsRequest(), timeout=1)
                    except grpc.RpcError:
                        continue
                return process
            time.sleep(0.05)
        raise AssertionError("nobody leads")

    def owners(self) -> list[tuple[str, int, str]]:
        return sorted((a.name, a.epoch, a.replicator) for a in self.assignments())

    def written(self) -> float:
        """Rows that the replicators have made durable in the sink, ever."""
        rows = 0.0
        for replicator in self.replicators:
            with urllib.request.urlopen(replicator.metrics_url, timeout=5) as answer:
                found = re.findall(
                    r"^milvus_cdc_replicator_written_rows_total\{.*\} (\S+)$",
                    answer.read().decode(),
                    re.MULTILINE,
                )
            rows += sum(map(float, found))
        return rows


class Flow:
    """The longest time in which no row reached the sink."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._over = threading.Event()
        self.longest_pause = 0.0
        self._thread = threading.Thread(target=self._watch, name="flow")

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        before = self._fleet.written()
        since = time.monotonic()
        while not self._over.wait(0.05):
            now = self._fleet.written()
            self.longest_pause = max(self.longest_pause, time.monotonic() - since)
            if now > before:
                before, since = now, time.monotonic()


def _kill(controller: ControllerProcess) -> None:
    controller.kill()


def _freeze(controller: ControllerProcess) -> None:
    controller.pause()


def _stop(controller: ControllerProcess) -> None:
    # Its port is closed to new calls before it has ended.
    threading.Thread(target=controller.stop, name="stop").start()


def elections(
    stack: Stack, folder: Path, database: str, ends: Sequence[Callable[[ControllerProcess], None]]
) -> None:
    """The leader is ended in each of these ways, one after the other, under load."""
    load = Load(stack.source.uri, database, pause_seconds=0.02)
    load.create()
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    fail_overs: list[float] = []
    pauses: list[float] = []
    with Fleet(stack, folder, f"cdc-{random.random()}") as fleet:
        fleet.create(f"{database}.*")
        load.start()
        fleet.wait_running(*names)
        # The leases and horizons of all of them are fresh.
        time.sleep(5)
        before = fleet.owners()
        for end in ends:
            old = fleet.leader()
            others = [process for process in fleet.controllers if process is not old]
            fleet.controller = others[0]
            with Flow(fleet) as flow:
                rows_before, began = fleet.written(), time.monotonic()
                end(old)
                fleet.leader(old)
                took = time.monotonic() - began
                rows_meanwhile = fleet.written() - rows_before
                # Until the replicators have a lease and horizons of the new leader.
                time.sleep(max(0.0, FAIL_OVER_SECONDS + 8 - took))
            assert fleet.owners() == before, "an assignment moved"
            print(
                f"{end.__name__.strip('_')}: another controller led after {took:.2f} s (lease "
                f"{LEASE_SECONDS} s), longest time without a row at the sink "
                f"{flow.longest_pause:.2f} s, {rows_meanwhile:.0f} rows while nobody led, "
                f"0 of {len(before)} assignments moved",
                flush=True,
            )
            fail_overs.append(took)
            pauses.append(flow.longest_pause)
            assert took < FAIL_OVER_SECONDS
            assert rows_meanwhile or end is _stop, "rows waited for the election"
            if end is _freeze:
                old.resume()
            elif not old.running:
                old.start()
        load.stop()
        fleet.wait_running(*names)
        rows = fleet.prove()
        assert fleet.owners() == before
        print(f"{rows} rows compared after {len(ends)} elections: equal")
        print(spread("controller fail-over", fail_overs, goal=FAIL_OVER_SECONDS))
        print(spread("time without a row meanwhile", pauses))
        for process in (*fleet.controllers, *fleet.replicators):
            assert_quiet(process.log_path, (*LOST_PEER, "leads", "nobody leads", "election"))


@pytest.mark.timeout(400)
def test_rows_go_on_while_another_controller_is_elected(nats_stack: Stack, tmp_path: Path) -> None:
    elections(nats_stack, tmp_path, "three_controllers", (_kill, _freeze, _stop))


@pytest.mark.soak
def test_twenty_one_elections(nats_stack: Stack, tmp_path: Path) -> None:
    elections(nats_stack, tmp_path, "elections", (_kill, _freeze, _stop) * 7)
