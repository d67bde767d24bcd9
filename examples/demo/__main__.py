"""`python -m examples.demo`: one Milvus follows another, a replicator dies, the rows are equal.

`KEEP=1` leaves everything running until Ctrl-C and prints addresses and next commands.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from pymilvus import MilvusClient

from examples.demo import data, proof
from examples.demo.services import Demo
from examples.demo.stream import Stream, Writer, create
from examples.demo.watch import Counter, Watch
from tests.servers.services import LEASE_SECONDS

TASK = "tasks/demo"
STREAM_SECONDS = 42.0
KILL_AT = 12.0
RECREATE_AT = 20.0
PARTITION_AT = 26.0
CATCH_UP_SECONDS = 60.0
TAKE_OVER_SECONDS = 30.0
BUSIEST = "default.digits"


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    # It logs what is refused, and collections that are not loaded yet are an everyday matter here.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    began = time.monotonic()
    keep = os.environ.get("KEEP", "") not in ("", "0")
    with Demo() as demo:
        try:
            _run(demo)
            print(f"\nThe sink is equal to its source. {time.monotonic() - began:.0f} s in all.")
            if keep:
                _stay(demo)
        except KeyboardInterrupt:
            print("\ninterrupted; stopping what was started", file=sys.stderr)
            return 130
        except Exception as error:
            kept = demo.keep_logs()
            print(f"\nDEMO FAILED: {error}\nlogs: {kept}", file=sys.stderr)
            return 1
    return 0


def _run(demo: Demo) -> None:
    print("Starting etcd, a source Milvus on its own NATS and a sink Milvus ...", flush=True)
    demo.start_servers()
    print(f"  source {demo.stack.source.uri}   sink {demo.stack.sink.uri}")
    stream = Stream(demo.stack.source.uri)
    root = MilvusClient(demo.stack.source.uri)
    root.create_database("shop")
    shop = MilvusClient(demo.stack.source.uri, db_name="shop")
    writers = _fill(stream, root, shop)
    print("Starting the controller and two replicators ...", flush=True)
    demo.start_services()
    demo.write_task("demo")
    print(f"\n$ export {demo.variable}")
    print(f"$ cat task.yaml\n{demo.task_file.read_text()}", end="", flush=True)
    if demo.run("task", "create", "-f", demo.task_file.name) != 0:
        raise proof.Disproved("milvus-cdc task create failed")
    source, sink = Counter(demo.stack.source.uri), Counter(demo.stack.sink.uri)
    watch = Watch(demo, TASK, source, sink)
    try:
        _stream(demo, stream, writers, shop, watch)
        _catch_up(watch)
    finally:
        watch.stop()
        stream.finish()
        source.close()
        sink.close()
    stream.check()
    _totals(stream)
    if demo.run("task", "collections", "demo") or demo.run("replicator", "list"):
        raise proof.Disproved("milvus-cdc could not list collections and replicators")
    proof.verify(demo, TASK)
    proof.same_neighbours(demo)
    print(f"{proof.QUERIES} searches: the same {proof.NEIGHBOURS} nearest neighbours on both sides")
    proof.excluded_is_absent(demo)
    proof.only_the_new_one(demo, dim=12)
    root.close()
    shop.close()


def _fill(stream: Stream, root: MilvusClient, shop: MilvusClient) -> list[Writer]:
    """Every table with rows in it before anybody replicates."""
    print("Creating collections and their first rows at the source ...", flush=True)
    plan = [
        (data.digits(), 900, 9_000),
        (data.digits_by_name(), 240, 2_000),
        (data.prints(), 240, 2_000),
        (data.products(), 200, 1_000),
        (data.events(), 300, 1_000),
        (data.sessions(8), 120, 500),
        (data.scratch(), 120, 500),
    ]
    writers = []
    for table, rows_per_second, backlog in plan:
        create(shop if table.database == "shop" else root, table)
        writer = stream.add(table, rows_per_second)
        writer.backlog(backlog)
        writers.append(writer)
    return writers


def _stream(
    demo: Demo, stream: Stream, writers: list[Writer], shop: MilvusClient, watch: Watch
) -> None:
    """Writes for STREAM_SECONDS; on the way a replicator dies and a collection changes its life."""
    watch.title = "milvus-cdc: writes, upserts and deletes at the source"
    watch.start()
    ends = {writer.table.full_name: stream.start(writer) for writer in writers}
    end_sessions = ends["shop.sessions"]
    failover = Failover(demo, watch)
    recreated = partitioned = False
    while watch.elapsed < STREAM_SECONDS or not failover.done:
        watch.look()
        watch.check()
        stream.check()
        failover.step()
        if not recreated and watch.elapsed >= RECREATE_AT:
            recreated = True
            stream.do("drop and create", lambda: _recreate(stream, shop, watch, end_sessions))
        if not partitioned and watch.elapsed >= PARTITION_AT:
            partitioned = True
            stream.do("new partition", lambda: _new_partition(stream, shop, watch))
        time.sleep(0.5)
    stream.finish()
    stream.check()
    watch.tell("the writers have stopped")


class Failover:
    """Kills the replicator that holds the busiest collection and waits for another to take it."""

    def __init__(self, demo: Demo, watch: Watch) -> None:
        self.done = False
        self._demo = demo
        self._watch = watch
        self._victim = ""
        self._deadline = KILL_AT + TAKE_OVER_SECONDS
        self._killed_at = 0.0

    def step(self) -> None:
        """Disproved when nobody held the collection, or nobody takes it."""
        now, owner = self._watch.elapsed, self._watch.owner(BUSIEST)
        if self.done or now < KILL_AT:
            return
        if now > self._deadline:
            what = "took over" if self._victim else "held"
            raise proof.Disproved(f"nobody {what} {BUSIEST} within {TAKE_OVER_SECONDS:.0f} s")
        if not self._victim:
            if owner:
                self._kill(owner)
        elif owner not in ("", self._victim):
            self.done = True
            self._watch.tell(
                f"{owner} took {BUSIEST} over {now - self._killed_at:.1f} s after the kill"
                f" (a lease of {LEASE_SECONDS} s had to end first)"
            )

    def _kill(self, name: str) -> None:
        replicator = next(r for r in self._demo.replicators if r.name == name)
        held = sum(1 for s in self._watch.seen if s.owner == name)
        pid = replicator.pid
        replicator.kill()
        self._victim, self._killed_at = name, self._watch.elapsed
        self._deadline = self._killed_at + TAKE_OVER_SECONDS
        self._watch.tell(
            f"kill -9 {pid}: {name} is dead, it held {held} collections, {BUSIEST} among them"
        )


def _recreate(
    stream: Stream, shop: MilvusClient, watch: Watch, end_writer: Callable[[], None]
) -> None:
    old, new = data.sessions(8), data.sessions(12)
    end_writer()
    shop.release_collection(old.name)
    shop.drop_collection(old.name)
    create(shop, new)
    watch.tell(f"{new.full_name} was dropped and created again with another schema")
    stream.start(stream.add(new, 120))


def _new_partition(stream: Stream, shop: MilvusClient, watch: Watch) -> None:
    events = data.events()
    shop.create_partition(events.name, "app")
    watch.tell(f"partition app of {events.full_name} was created and gets rows")
    stream.start(stream.add(events, 120, first=data.LATE_EVENTS))


def _catch_up(watch: Watch) -> None:
    """Until both sides count the same everywhere and the sink is past the last write."""
    ended = watch.elapsed
    watch.title = "milvus-cdc: the writers have stopped, the last rows arrive"
    while True:
        seen = watch.look()
        watch.check()
        late = [
            s
            for s in seen
            if s.state != "RUNNING"
            or not s.equal_counts
            or s.behind is None
            or s.behind > watch.elapsed - ended
        ]
        if seen and not late:
            watch.tell(f"every collection caught up {watch.elapsed - ended:.1f} s later")
            return
        if watch.elapsed - ended > CATCH_UP_SECONDS:
            names = ", ".join(f"{s.name} ({s.state} {s.reason})" for s in late)
            raise proof.Disproved(f"not caught up after {CATCH_UP_SECONDS:.0f} s: {names}")
        time.sleep(0.5)


def _totals(stream: Stream) -> None:
    counts = stream.counts
    print(
        f"\nwritten at the source: {counts.inserted:,} rows inserted, {counts.upserted:,} upserted,"
        f" {counts.deleted:,} deleted"
    )


def _stay(demo: Demo) -> None:
    print("\nEverything keeps running until Ctrl-C.\n")
    print(f"  source Milvus   {demo.stack.source.uri}")
    print(f"  sink Milvus     {demo.stack.sink.uri}")
    print(f"  NATS            {demo.stack.source.nats_url}")
    print(f"  etcd            {demo.stack.etcd.endpoint}")
    print(f"  controller      {demo.controller.address}")
    for name, url in demo.metrics().items():
        print(f"  metrics         {url}   ({name})")
    print(f"  logs            {demo.folder}\n")
    print("Next:")
    if shutil.which("milvus-cdc") is None:
        print(f"  export PATH={Path(sys.executable).parent}:$PATH")
    print(f"  export {demo.variable}")
    for command in ("task collections demo", "task watch", "assignment list", "verify demo"):
        print(f"  milvus-cdc {command}")
    print("Delete at the source and see it arrive; then delete at the sink and see verify find it:")
    _print_delete(demo.stack.source.uri, "digit == 3")
    _print_delete(demo.stack.sink.uri, "image in [1, 2]")
    sys.stdout.flush()
    done = threading.Event()
    try:
        while not done.wait(1):
            ended = [p.name for p in demo.stack.servers if not p.running]
            if ended:
                raise RuntimeError(f"{', '.join(ended)} ended by itself")
    except KeyboardInterrupt:
        print("\nstopping")


def _print_delete(uri: str, expression: str) -> None:
    code = (
        f"from pymilvus import MilvusClient as C; print(C('{uri}').delete('digits',"
        f" filter='{expression}'))"
    )
    print(f'  {sys.executable} -c "{code}"')


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
