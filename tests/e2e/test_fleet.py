"""Replicators drained, cordoned and stopped, collections moved and evened out, while rows flow
between two real servers; in the end every row is there once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient

from tests.e2e.load import SHAPES, Load, create_collection
from tests.e2e.pair import Pair
from tests.e2e.pauses import Pauses
from tests.servers import Stack

ONE, TWO = "replicator-0", "replicator-1"


def run(pair: Pair, *arguments: str, code: int = 0) -> str:
    """The command as a person gives it."""
    done = subprocess.run(
        [sys.executable, "-m", "milvus_cdc.cli.main", *arguments],
        env=os.environ | {"MILVUS_CDC_CONTROLLER": pair.controller.address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, (arguments, done)
    return done.stdout + done.stderr


def told(pair: Pair, *arguments: str) -> Any:
    return json.loads(run(pair, *arguments, "-o", "json"))


def owners(pair: Pair) -> dict[str, str]:
    return {a.collection: a.replicator.partition("/")[2] for a in pair.assignments()}


def say(what: str, pauses: Pauses, since: float) -> None:
    found = {
        name: seconds
        for name, seconds in pauses.longest(since, time.monotonic()).items()
        if name.partition(".")[2] in {shape.name for shape in SHAPES}
    }
    longest = max(found.values(), default=0.0)
    shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(found.items()))
    print(f"{what}: longest pause {longest:.2f} s ({shown})")


@pytest.mark.timeout(600)
def test_drained_moved_and_cordoned_under_load(nats_stack: Stack, tmp_path: Path) -> None:
    database = "fleet"
    load = Load(nats_stack.source.uri, database, seed=3, pause_seconds=0.05)
    load.create()
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    with Pair(nats_stack, tmp_path, replicators=2) as pair:
        pair.replicators[1].stop()
        pair.create(f"{database}.*")
        load.start()
        pair.wait_running(*names)
        pair.replicators[1].start()
        with Pauses(pair.replicators) as pauses:
            time.sleep(5)
            say("nothing moves", pauses, time.monotonic() - 4)

            # A collection made while the second is cordoned goes to the first.
            run(pair, "replicator", "cordon", TWO)
            client = MilvusClient(uri=nats_stack.source.uri, db_name=database)
            client.create_collection("late", dimension=8)
            client.insert("late", [{"id": n, "vector": [float(n)] * 8} for n in range(50)])
            client.close()
            pair.wait_running(f"{database}.late")
            assert owners(pair)[f"{database}.late"] == ONE
            moved = next(a for a in pair.assignments() if a.collection == names[0])
            answer = run(pair, "assignment", "move", moved.name, "--to", TWO, code=3)
            assert "REPLICATOR_CORDONED" in answer
            run(pair, "replicator", "uncordon", TWO)

            since = time.monotonic()
            run(pair, "assignment", "move", moved.name, "--to", TWO)
            assert owners(pair)[names[0]] == TWO
            time.sleep(1)
            say(f"move of {names[0]}", pauses, since)

            since = time.monotonic()
            answer = run(pair, "replicator", "drain", ONE, "--within", "60")
            print(answer)
            assert set(owners(pair).values()) == {TWO}
            (shown,) = [
                r
                for r in told(pair, "replicator", "list")["replicators"]
                if r["name"] == f"replicators/{ONE}"
            ]
            assert shown["state"] == "REPLICATOR_STATE_STOPPED"
            time.sleep(1)
            say(f"drain of {ONE}", pauses, since)

            # The last one: refused, and nothing happens.
            assert "NO_OTHER_REPLICATOR" in run(pair, "replicator", "drain", TWO, code=3)
            assert set(owners(pair).values()) == {TWO}

            # SIGTERM is a drain, too.
            run(pair, "replicator", "uncordon", ONE)
            since = time.monotonic()
            pair.replicators[1].stop()
            print(f"{TWO} ended after {time.monotonic() - since:.2f} s")
            assert set(owners(pair).values()) == {ONE}
            time.sleep(1)
            say(f"SIGTERM of {TWO}", pauses, since)
        load.stop()
        rows = pair.prove()
        print(f"{rows} rows compared")
        pair.quiet("stream ended")


@pytest.mark.timeout(600)
def test_evened_out_after_a_join(nats_stack: Stack, tmp_path: Path) -> None:
    database = "evened"
    load = Load(nats_stack.source.uri, database, seed=4, pause_seconds=0.05)
    load.create()
    client = MilvusClient(uri=nats_stack.source.uri, db_name=database)
    create_collection(client, SHAPES[0].__class__("more", SHAPES[0].fields))
    client.close()
    names = [f"{database}.{shape.name}" for shape in SHAPES]
    policy = {"settleSeconds": 30, "movesPerMinute": 60, "hysteresis": 0.1}
    with Pair(nats_stack, tmp_path, replicators=3, placement=policy) as pair:
        for late in pair.replicators[1:]:
            late.stop()
        pair.create(f"{database}.*")
        load.start()
        pair.wait_running(*names)
        with Pauses(pair.replicators) as pauses:
            since = time.monotonic()
            pair.replicators[1].start()
            plan = told(pair, "assignment", "rebalance", "--dry-run")
            print(plan)
            assert plan["moves"]
            assert set(owners(pair).values()) == {ONE}, "it was only shown"
            print(run(pair, "assignment", "rebalance"))
            pair.wait("moved", lambda: list(owners(pair).values()).count(TWO) >= len(plan["moves"]))
            pair.wait_running(*names)
            say("evened out by hand", pauses, since)
            # The third gets its part without anybody's wish.
            since = time.monotonic()
            pair.replicators[2].start()
            third = pair.replicators[2].name
            pair.wait("by itself", lambda: third in owners(pair).values())
            pair.wait_running(*names)
            say("evened out by itself", pauses, since)
        load.stop()
        print(owners(pair))
        print(f"{pair.prove()} rows compared")
        pair.quiet("stream ended")
