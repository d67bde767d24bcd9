"""The core under arbitrary losses, pauses, restarts and reorderings: its laws as properties."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.effects import Effect
from milvus_cdc_controller.core.grant import ReportedState

from tests.unit.controller.world import LEASES, Script, collection, dropped, spec

NAMES = st.sampled_from(("a", "b", "c"))
IDS = (11, 12, 13)


class Cluster(RuleBasedStateMachine):
    """Replicators modelled by what they may do: hold what they were given and have not released,
    and write it while the lease runs that their last acknowledged heartbeat gave them, or that ran
    when it was asked back.
    """

    @initialize()
    def begin(self) -> None:
        self.script = Script()
        self.streams: dict[str, int] = {}
        self.last_stream = 0
        self.holds: dict[str, dict[str, int]] = {name: {} for name in "abc"}
        self.asked: dict[str, dict[str, int]] = {name: {} for name in "abc"}
        self.stopping: dict[str, dict[str, int]] = {name: {} for name in "abc"}
        self.lease_end: dict[str, int] = dict.fromkeys("abc", 0)
        self.owners: dict[tuple[str, int], str] = {}
        self.ts = 0
        self.seq = 0
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.alive = set(IDS[:2])
        self.gone: set[int] = set()
        self.take(self.script.take, ev.CreateTask(self.script.now, 1, "uid", spec(), "", "", True))
        self.read()

    def take(self, call: Any, *arguments: Any) -> None:
        effects: list[Effect] = call(*arguments)
        self.learn(effects)

    def learn(self, effects: list[Effect]) -> None:
        """What the replicators hear, at once."""
        by_stream = {stream: name for name, stream in self.streams.items()}
        for effect in effects:
            if not isinstance(effect, fx.Send) or effect.stream not in by_stream:
                continue
            name = by_stream[effect.stream]
            match effect.message:
                case fx.Assign(assignment_id=key, epoch=epoch):
                    assert self.owners.setdefault((key, epoch), name) == name, "a shared epoch"
                    for other, held in self.holds.items():
                        if other != name and key in held:
                            ended = self.writes_until(other, key) <= self.script.at_ms
                            assert ended, f"{key}: {name} beside {other}"
                    if self.holds[name].get(key) != epoch:
                        self.stopping[name].pop(key, None)
                    self.holds[name][key] = epoch
                case fx.Revoke(assignment_id=key, epoch=epoch):
                    self.asked[name][key] = epoch
                    # It starts nothing more; what is in flight ends within the lease as it is now.
                    if self.holds[name].get(key) == epoch:
                        self.stopping[name].setdefault(key, self.lease_end[name])
                case fx.HeartbeatAck():
                    self.lease_end[name] = self.script.at_ms + LEASES.ttl_ms

    def writes_until(self, name: str, key: str) -> int:
        return self.stopping[name].get(key, self.lease_end[name])

    def read(self) -> None:
        there = [
            dropped(collection(i, f"c{i % 2}")) if i in self.gone else collection(i, f"c{i % 2}")
            for i in IDS
            if i in self.alive or i in self.gone
        ]
        self.script.revision += 1
        self.take(lambda: self.script.see(*there))

    @rule(name=NAMES)
    def connect(self, name: str) -> None:
        self.last_stream += 1
        self.streams[name] = self.last_stream
        # A process past its lease has stopped writing, yet still names what it holds.
        held = tuple(ev.Held(key, epoch, 1) for key, epoch in self.holds[name].items())
        self.asked[name] = {}
        self.take(lambda: self.script.hello(self.last_stream, name, held))
        self.beat(name, False)

    @rule(name=NAMES)
    def lose(self, name: str) -> None:
        if name in self.streams:
            stream = self.streams.pop(name)
            self.take(self.script.take, ev.StreamLost(self.script.now, stream))

    @rule(name=NAMES, draining=st.booleans())
    def beat(self, name: str, draining: bool) -> None:
        if name in self.streams:
            event = ev.Heartbeat(self.script.now, self.streams[name], 1, draining)
            self.take(self.script.take, event)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        if name not in self.streams:
            return
        for key, epoch in list(self.asked[name].items()):
            del self.asked[name][key]
            if self.holds[name].get(key) == epoch:
                del self.holds[name][key]
            event = ev.Released(self.script.now, self.streams[name], key, epoch)
            self.take(self.script.take, event)

    @rule(
        name=NAMES,
        step=st.integers(-5, 10),
        opened=st.booleans(),
        closed=st.booleans(),
        done=st.booleans(),
        failed=st.booleans(),
    )
    def report(
        self, name: str, step: int, opened: bool, closed: bool, done: bool, failed: bool
    ) -> None:
        if name not in self.streams:
            return
        for key, epoch in list(self.holds[name].items()):
            if key.endswith("metadata"):
                continue
            number = int(key.rpartition(".")[2])
            self.seq += 1
            self.ts = max(0, self.ts + step)
            point = ev.VchannelReport(
                f"dml_{number % 4}_{number}v0", b"p", self.ts, closed, self.ts + 5
            )
            if failed:
                del self.holds[name][key]
            event = ev.ProgressReported(
                self.script.now,
                self.streams[name],
                key,
                epoch,
                self.seq,
                ReportedState.FAILED if failed else ReportedState.RUNNING,
                vchannels=(point,),
                opened=ev.SinkOpened(9) if opened else None,
                dropped=done,
            )
            self.take(self.script.take, event)

    @rule(milliseconds=st.sampled_from((100, 3_000, 6_000, 20_000)))
    def wait(self, milliseconds: int) -> None:
        self.script.at_ms += milliseconds
        self.take(self.script.take, ev.Ticked(self.script.now))

    @rule(number=st.sampled_from(IDS), what=st.sampled_from(("create", "drop", "vanish")))
    def change_source(self, number: int, what: str) -> None:
        if what == "create" and number not in self.gone and not self.forgotten(number):
            self.alive.add(number)
        elif what == "drop" and number in self.alive:
            self.alive.discard(number)
            self.gone.add(number)
        elif what == "vanish":
            self.gone.discard(number)
            self.alive.discard(number)
        self.read()

    def forgotten(self, number: int) -> bool:
        """It was given out, and has vanished without a trace: no Milvus gives its id to another."""
        given = any(key.endswith(f".{number}") for key, _ in self.owners)
        known = self.script.core.world.collections.get("uid", {})
        return given and number not in known

    @rule(what=st.sampled_from(("pause", "resume", "retry", "resync")))
    def command(self, what: str) -> None:
        now, task = self.script.now, "tasks/copy"
        if what == "resync":
            self.seen.clear()
        self.take(
            self.script.take,
            {
                "pause": ev.PauseTask(now, 1, task, ""),
                "resume": ev.ResumeTask(now, 1, task, ""),
                "retry": ev.RetryTask(now, 1, task, ""),
                "resync": ev.ResyncCollection(now, 1, task, "default.c1"),
            }[what],
        )

    @rule()
    def restart_controller(self) -> None:
        """The store is all that is left; streams break; clocks go on."""
        self.streams.clear()
        self.script = Script(self.script.stored, at_ms=self.script.at_ms)
        self.read()

    @invariant()
    def what_is_stored_is_what_is_known(self) -> None:
        world = self.script.core.world
        for key, grant in world.grants.items():
            assert self.script.stored[f"assignments/{key}"] == grant
        for uid, records in world.collections.items():
            for number, record in records.items():
                assert self.script.stored[f"collections/{uid}/{number}"] == record

    @invariant()
    def progress_does_not_go_back(self) -> None:
        world = self.script.core.world
        for key, progress in world.progress.items():
            record = world.record_of(key)
            assert record is not None
            if record.recreate or not progress.checkpoints:
                self.seen.pop(key, None)
                continue
            (point,) = progress.checkpoints
            now = (point.resolved_ts, point.horizon_ts, int(point.closed))
            before = self.seen.get(key, now)
            assert all(a >= b for a, b in zip(now, before, strict=True)), (before, now)
            self.seen[key] = now
        for key in self.seen.keys() - world.progress.keys():
            del self.seen[key]

    @invariant()
    def one_holder_of_a_name(self) -> None:
        for records in self.script.core.world.collections.values():
            names = [record.sink_name for record in records.values() if record.holds_name]
            assert len(names) == len(set(names))


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
