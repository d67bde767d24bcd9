"""The one door to the controller's core: an event goes in, effects come out.

Laws: no clock, no randomness, no I/O; within one step everything to be stored stands before
everything to be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from milvus_cdc_controller.core import (
    commands,
    events,
    fleet,
    holding,
    moves,
    positions,
    presence,
    sessions,
    sources,
    splitting,
)
from milvus_cdc_controller.core.assigning import settle
from milvus_cdc_controller.core.effects import Effect, Forget, Publish, Record, Save
from milvus_cdc_controller.core.liveness import Leases, SessionState
from milvus_cdc_controller.core.sharing import tell_parts
from milvus_cdc_controller.core.status import refresh
from milvus_cdc_controller.core.world import World

PUBLISH_EVERY_MS = 1_000

_HANDLERS: dict[type[events.Event], Callable[[World, Any], None]] = {
    events.CreateTask: commands.create_task,
    events.UpdateTask: commands.update_task,
    events.PauseTask: commands.pause_task,
    events.ResumeTask: commands.resume_task,
    events.DeleteTask: commands.delete_task,
    events.RetryTask: commands.retry_task,
    events.ResyncCollection: commands.resync_collection,
    events.SetPositions: commands.set_positions,
    events.CordonReplicator: fleet.cordon,
    events.UncordonReplicator: fleet.uncordon,
    events.DrainReplicator: fleet.drain,
    events.CancelDrain: fleet.cancel_drain,
    events.MoveAssignment: fleet.move,
    events.Rebalance: fleet.rebalance,
    events.ForgetHold: holding.forget_hold,
    events.CatalogueSeen: sources.catalogue_seen,
    events.SourceUnavailable: sources.source_unavailable,
    events.PartitionRead: sources.partition_read,
    events.PartitionAsked: sources.partition_asked,
    events.Hello: sessions.hello,
    events.StreamLost: sessions.stream_lost,
    events.Heartbeat: sessions.heartbeat,
    events.Acked: sessions.acked,
    events.Nacked: sessions.nacked,
    events.Released: sessions.released,
    events.ProgressReported: sessions.progress_reported,
    events.JobAsked: sessions.job_asked,
    events.JobCancelled: sessions.job_cancelled,
    events.JobUpdated: sessions.job_updated,
}


class Controller:
    """Owns the world. `world` may be read between steps, never changed from outside."""

    def __init__(self, leases: Leases, records: Iterable[Record] = ()) -> None:
        self.world = World(leases)
        self.world.restore(records)
        self._published_ms = 0
        self._faces: dict[str, tuple[SessionState, bool]] = {}

    @property
    def unfinished(self) -> bool:
        """The next tick has more to do than to look at the time, so it had better come soon."""
        return self.world.more

    def step(self, event: events.Event) -> list[Effect]:
        world = self.world
        assert event.at.mono_ms >= world.now.mono_ms, "monotonic time went back"
        world.now = event.at
        world.effects = []
        match event:
            case events.Started():
                sessions.started(world)
                holding.restored(world)
            case events.Ticked():
                self._tick()
            case _:
                _HANDLERS[type(event)](world, event)
        looked_at = settle(world)
        if looked_at:
            sources.advance_work(world)
            looked_at.merge(settle(world))
            tell_parts(world, looked_at)
        if looked_at or isinstance(event, events.Ticked):
            holding.advance(world, looked_at)
            looked_at.merge(settle(world))
        for uid in sorted(looked_at):
            refresh(world, uid, looked_at.of(uid))
        assert not world.dirty
        return ordered(world.effects)

    def _tick(self) -> None:
        world = self.world
        sessions.expire(world)
        presence.look(world)
        moves.misplaced(world)
        moves.advance(world)
        moves.balance(world)
        splitting.look(world)
        now_ms = world.now.mono_ms
        faces = {
            instance: (
                session.state(world.leases, now_ms),
                session.takes_work(world.leases, now_ms),
            )
            for instance, session in world.sessions.items()
        }
        if faces != self._faces:
            for instance, session in world.sessions.items():
                if faces[instance] != self._faces.get(instance):
                    world.touch_held(session)
            self._faces = faces
            world.touch_fleet()
        if world.more:
            world.more = False
            world.touch_unplaced()
        for uid, task in world.tasks.items():
            work = world.work[uid]
            if task.active and not (task.probed and task.created):
                world.touch_state(uid)
            elif work.resolve_job or work.not_before_ms or work.check_job:
                world.touch_state(uid)
        positions.look_after(world, sources.start_job)
        if world.now.mono_ms - self._published_ms >= PUBLISH_EVERY_MS:
            self._published_ms = world.now.mono_ms
            for uid in sorted(world.stirred & world.tasks.keys()):
                world.effects.append(Publish(uid))
            world.stirred.clear()


def ordered(effects: list[Effect]) -> list[Effect]:
    """Saves first, each key once with its last contents; then the rest, tasks published once."""
    saves: dict[str, Effect] = {}
    published: dict[str, Publish] = {}
    rest: list[Effect] = []
    for effect in effects:
        match effect:
            case Save(key=key) | Forget(key=key):
                saves.pop(key, None)
                saves[key] = effect
            case Publish(uid=uid):
                published.pop(uid, None)
                published[uid] = effect
            case _:
                rest.append(effect)
    return [*saves.values(), *rest, *published.values()]
