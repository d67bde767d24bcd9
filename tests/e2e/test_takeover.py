"""How long rows wait when a replicator dies, and when it only gives work away: in figures. The
controllers' own fail-over is in test_controllers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from milvuscdc.v1 import fleet_service_pb2

from tests.e2e.load import SHAPES, Load
from tests.e2e.pair import Pair
from tests.e2e.pauses import Pauses, at_99, spread
from tests.e2e.test_crashes import LOST_PEER
from tests.e2e.test_fleet import owners
from tests.servers import Stack
from tests.servers.services import ReplicatorProcess

GOAL_SECONDS = 3.0
"""From the end of lease and margin to the first row of another owner."""
MOVE_GOAL_SECONDS = 1.0


class Lease(NamedTuple):
    ttl: float
    heartbeat: float
    margin: float

    @property
    def settings(self) -> dict[str, float]:
        return {"ttl": self.ttl, "heartbeat": self.heartbeat, "clockMargin": self.margin}

    @property
    def least(self) -> float:
        """From the owner's death to another one's first row: its last heartbeat may have arrived
        an interval before.
        """
        return self.ttl + self.margin - self.heartbeat

    @property
    def most(self) -> float:
        return self.ttl + self.margin + GOAL_SECONDS


SHORT = Lease(6, 1, 1)
DEFAULT = Lease(15, 3, 2)


def takeovers(stack: Stack, folder: Path, database: str, kills: int, lease: Lease) -> list[float]:
    """Whoever holds most is killed, again and again, under load. Seconds from there to the first
    row of each of its collections, by another.
    """
    load = Load(stack.source.uri, database, seed=11, pause_seconds=0.05, rows_max=2_000)
    load.create()
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    rng = random.Random(database)
    seconds: list[float] = []
    with Pair(stack, folder, replicators=2, lease=lease.settings) as pair:
        pair.create(f"{database}.*")
        load.start()
        pair.wait_running(*names)
        with Pauses(pair.replicators) as pauses:
            for _ in range(kills):
                # At any time between two heartbeats.
                time.sleep(1 + rng.uniform(0, lease.heartbeat))
                held = owners(pair)
                victim = max(pair.replicators, key=lambda r: list(held.values()).count(r.name))
                lost = [name for name in names if held[name] == victim.name]
                assert lost
                since = time.monotonic()
                victim.kill()
                found = _first_rows(pair, pauses, lost, since, victim)
                assert min(found) > lease.least, "it might still have been writing"
                seconds += found
                print(f"{victim.name} killed with {len(lost)}: {max(found):.2f} s", flush=True)
                victim.start()
                pair.wait_running(*names)
        load.stop()
        print(f"{pair.prove()} rows compared after {kills} kills: equal")
        pair.quiet(*LOST_PEER)
    print(
        spread(f"take-over (lease {lease.ttl:g} s + {lease.margin:g} s)", seconds, goal=lease.most)
    )
    return seconds


def _first_rows(
    pair: Pair, pauses: Pauses, names: list[str], since: float, dead: ReplicatorProcess
) -> list[float]:
    def found() -> list[float | None]:
        return [pauses.first(name, since, but=dead.name) for name in names]

    pair.wait("rows of another owner", lambda: None not in found(), seconds=90)
    return [seconds for seconds in found() if seconds is not None]


@pytest.mark.timeout(400)
def test_a_killed_replicators_rows_go_on_elsewhere(nats_stack: Stack, tmp_path: Path) -> None:
    takeovers(nats_stack, tmp_path, "taken_over", 1, SHORT)


@pytest.mark.soak
@pytest.mark.parametrize(("named", "lease"), [("short", SHORT), ("default", DEFAULT)])
def test_twenty_takeovers(nats_stack: Stack, tmp_path: Path, named: str, lease: Lease) -> None:
    seconds = takeovers(nats_stack, tmp_path, f"takeovers_{named}", 20, lease)
    assert at_99(seconds) < lease.most


@pytest.mark.soak
def test_a_hundred_moves_drains_and_stops(nats_stack: Stack, tmp_path: Path) -> None:
    """Of busy collections between two replicators: the longest time without a row of each."""
    database = "moves"
    load = Load(nats_stack.source.uri, database, seed=12, pause_seconds=0.05, rows_max=2_000)
    load.create()
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        pair.create(f"{database}.*")
        load.start()
        pair.wait_running(*names)
        with Pauses(pair.replicators) as pauses:

            def waited(collections: list[str], act: Callable[[], None]) -> list[float]:
                since = time.monotonic()
                act()
                time.sleep(1)
                longest = pauses.longest(since, time.monotonic())
                return [longest[name] for name in collections]

            print(spread("nothing moves", waited(names, lambda: time.sleep(10))))
            moves: list[float] = []
            for _ in range(5):
                for name in names:
                    moves += waited([name], lambda name=name: _move(pair, name))  # type: ignore[misc]
            drains: list[float] = []
            stops: list[float] = []
            for n in range(10):
                one = pair.replicators[n % 2]
                drains += waited(names, lambda one=one: _drain(pair, one))  # type: ignore[misc]
                other = pair.replicators[1 - n % 2]
                _uncordon(pair, one)
                stops += waited(names, lambda other=other: _stop(other))  # type: ignore[misc]
                other.start()
        load.stop()
        print(f"{pair.prove()} rows compared: equal")
        pair.quiet("stream ended")
    for what, seconds in (("move", moves), ("drain", drains), ("SIGTERM", stops)):
        print(spread(f"pause of a collection at a {what}", seconds, goal=MOVE_GOAL_SECONDS))
    assert at_99([*moves, *drains, *stops]) < MOVE_GOAL_SECONDS


def _move(pair: Pair, name: str) -> None:
    (assignment,) = [a for a in pair.assignments() if a.collection == name]
    (to,) = [r.name for r in pair.replicators if f"replicators/{r.name}" != assignment.replicator]
    pair.fleet.MoveAssignment(
        fleet_service_pb2.MoveAssignmentRequest(
            name=assignment.name, replicator=f"replicators/{to}"
        ),
        timeout=10,
    )
    pair.wait("moved", lambda: owners(pair)[name] == to)


def _drain(pair: Pair, replicator: ReplicatorProcess) -> None:
    pair.fleet.DrainReplicator(
        fleet_service_pb2.DrainReplicatorRequest(name=f"replicators/{replicator.name}"), timeout=10
    )
    pair.wait("drained", lambda: replicator.name not in owners(pair).values())


def _uncordon(pair: Pair, replicator: ReplicatorProcess) -> None:
    pair.fleet.UncordonReplicator(
        fleet_service_pb2.UncordonReplicatorRequest(name=f"replicators/{replicator.name}"),
        timeout=10,
    )


def _stop(replicator: ReplicatorProcess) -> None:
    replicator.stop()
