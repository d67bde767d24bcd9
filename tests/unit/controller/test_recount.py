"""What is to be recounted after the loss of an owner: begun, kept, and ended."""

from __future__ import annotations

import pytest
from milvus_cdc.model import ms_to_tso
from milvus_cdc_controller.core import effects as fx
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.collection import Recount, Recounted
from milvus_cdc_controller.core.grant import ReportedState
from milvus_cdc_controller.core.recount import KEPT_MS, NOT_RECOUNTED
from milvus_cdc_controller.present import collection_message
from milvus_cdc_controller.specs import collection_spec
from milvus_cdc_controller.store.records import decode, encode
from milvuscdc.v1 import replication_service_pb2 as pb

from tests.unit.controller.test_core import BOOKS, opened, running
from tests.unit.controller.test_positions import let_go, place, set_to
from tests.unit.controller.world import Script, collection, dropped

SHARD = "dml_3_11v0"
NEXT = 2
FAR = ms_to_tso(KEPT_MS + 1)


def wrote(script: Script, stream: int, epoch: int, ts: int, **other: object) -> None:
    """Everything up to `ts` is durable, 50 more may be written."""
    point = ev.VchannelReport(SHARD, b"p%d" % ts, ts, wanted_horizon_ts=ts + 50)
    script.report(stream, BOOKS, epoch, vchannels=(point,), **other)


def writing() -> Script:
    script = running()
    opened(script)
    wrote(script, 1, 1, 100)
    return script


def lost() -> Script:
    """Its owner is lost, the next one has it."""
    script = writing()
    script.hello(NEXT, "b")
    script.take(ev.StreamLost(script.now, 1))
    script.pass_time(17_000, beating=(NEXT,))
    assert script.core.world.grants[BOOKS].epoch == 2
    return script


def told(script: Script, stream: int = NEXT) -> pb.CollectionSpec:
    """The collection as its owner was just told."""
    (assign,) = [a for a in script.sent(fx.Assign, stream) if a.collection]
    assert assign.collection is not None
    assert assign.progress is not None
    return collection_spec(assign.collection, assign.progress)


def pending(script: Script) -> Recount | None:
    stored = script.stored["checkpoints/uid-copy/11"]
    assert stored == script.core.world.progress[BOOKS]
    return script.core.world.progress[BOOKS].recount


def test_an_owner_that_was_lost_leaves_its_keys_to_be_recounted() -> None:
    script = lost()
    spec = told(script)
    assert spec.recount == pb.RECOUNT_WANTED
    (shard,) = spec.vchannels
    assert (shard.read_from, shard.resolved_ts, shard.horizon_ts) == (b"p100", 100, 150)
    assert (shard.recount_from, shard.recount_ts) == (b"p100", 100)
    progress = script.core.world.progress[BOOKS]
    assert decode("checkpoints/uid-copy/11", encode(progress)) == progress


def test_one_that_lets_go_or_fails_or_never_wrote_does_not() -> None:
    clean = writing()
    clean.hello(NEXT, "b")
    clean.take(ev.Heartbeat(clean.now, 1, 1, True))
    clean.take(ev.Released(clean.now, 1, BOOKS, 1))
    assert told(clean).recount == pb.RECOUNT_UNSPECIFIED
    failed = writing()
    failed.report(1, BOOKS, 1, state=ReportedState.FAILED, reason="SINK_REFUSED")
    assert pending(failed) is None
    never = running()
    never.pass_time(18_000)
    assert pending(never) is None


def test_the_second_loss_and_a_restart_keep_where_it_began() -> None:
    script = lost()
    wrote(script, NEXT, 2, 120)
    script = Script(script.stored, at_ms=script.at_ms)
    script.hello(3, "c")
    script.see(collection(11))
    script.pass_time(17_000, beating=(3,))
    spec = told(script, 3)
    assert spec.recount == pb.RECOUNT_WANTED
    (shard,) = spec.vchannels
    assert (shard.read_from, shard.resolved_ts, shard.horizon_ts) == (b"p120", 120, 170)
    assert (shard.recount_from, shard.recount_ts) == (b"p100", 100)


def test_a_clean_hand_over_keeps_it_too() -> None:
    script = lost()
    script.hello(3, "c")
    script.take(ev.Heartbeat(script.now, NEXT, 1, True))
    script.take(ev.Released(script.now, NEXT, BOOKS, 2))
    assert told(script, 3).recount == pb.RECOUNT_WANTED


def test_it_ends_with_the_word_of_the_owner_and_of_nobody_else() -> None:
    script = lost()
    wrote(script, NEXT, 1, 120, recounted=Recounted.DONE)
    assert pending(script) is not None
    wrote(script, NEXT, 2, 120, recounted=Recounted.DONE)
    assert pending(script) is None
    script.hello(3, "c")
    script.take(ev.Heartbeat(script.now, NEXT, 1, True))
    script.take(ev.Released(script.now, NEXT, BOOKS, 2))
    assert told(script, 3).recount == pb.RECOUNT_UNSPECIFIED


def wrong() -> Script:
    """Keys were wrong; the owner has let go and has it again."""
    script = lost()
    wrote(script, NEXT, 2, 300, recounted=Recounted.WRITE_AGAIN)
    assert [r.reason for r in script.sent(fx.Revoke)] == ["WRITE_AGAIN"]
    wrote(script, NEXT, 2, 310 + FAR, recounted=Recounted.WRITE_AGAIN)
    assert not script.sent(fx.Revoke), "once is enough"
    script.take(ev.Released(script.now, NEXT, BOOKS, 2))
    return script


def test_what_was_wrong_is_written_again_from_where_it_began() -> None:
    script = wrong()
    spec = told(script)
    assert spec.recount == pb.RECOUNT_WRITE_AGAIN
    (shard,) = spec.vchannels
    assert (shard.read_from, shard.resolved_ts, shard.horizon_ts) == (b"p100", 100, 360 + FAR)
    assert not shard.recount_from
    wrote(script, NEXT, 3, 150)
    (point,) = script.core.world.progress[BOOKS].checkpoints
    assert (point.read_from, point.resolved_ts) == (b"p%d" % (310 + FAR), 310 + FAR), (
        "it never goes back"
    )
    wrote(script, NEXT, 3, 320 + FAR, recounted=Recounted.DONE)
    assert pending(script) is None


def test_whoever_is_lost_while_writing_again_another_one_begins_there_however_far_back() -> None:
    script = wrong()
    script.take(ev.StreamLost(script.now, NEXT))
    script.pass_time(17_000)
    script.hello(3, "c")
    spec = told(script, 3)
    assert spec.recount == pb.RECOUNT_WANTED, "what that one sent is waited for, too"
    (shard,) = spec.vchannels
    assert (shard.read_from, shard.recount_from) == (b"p100", b"")
    record = script.core.world.collections["uid-copy"][11]
    shown = collection_message(script.core.world, record).conditions
    assert [each.type for each in shown] == ["WRITING_AGAIN"]
    progress = script.core.world.progress[BOOKS]
    assert decode("checkpoints/uid-copy/11", encode(progress)) == progress
    assert b'"format_version":10' in encode(progress), "no older controller takes it for less"
    wrote(script, 3, 4, 330 + FAR, recounted=Recounted.WRITE_AGAIN)
    script.take(ev.Released(script.now, 3, BOOKS, 4))
    spec = told(script, 3)
    assert spec.recount == pb.RECOUNT_WRITE_AGAIN, "as after any loss"
    assert spec.vchannels[0].read_from == b"p100"


def test_after_a_failure_a_retry_writes_it_once_more() -> None:
    script = wrong()
    script.report(NEXT, BOOKS, 3, state=ReportedState.FAILED, reason="DOUBLED_KEYS")
    script.take(ev.RetryTask(script.now, 9, "tasks/copy", "default.books"))
    assert told(script).recount == pb.RECOUNT_WRITE_AGAIN


def test_a_resync_and_a_position_set_by_hand_end_it() -> None:
    script = wrong()
    script.take(ev.ResyncCollection(script.now, 9, "tasks/copy", "default.books"))
    script.take(ev.Released(script.now, NEXT, BOOKS, 3))
    assert told(script).recount == pb.RECOUNT_UNSPECIFIED
    script = lost()
    script.take(ev.PauseTask(script.now, 9, "tasks/copy", ""))
    for grant in script.core.world.grants.values():
        script.take(ev.Released(script.now, NEXT, grant.assignment_id, grant.epoch))
    assert set_to(script, place()).refusal is None
    assert pending(script) is None


def test_a_dropped_collection_needs_no_recount() -> None:
    script = lost()
    script.see(dropped(collection(11)))
    assert told(script).recount == pb.RECOUNT_UNSPECIFIED


def test_when_no_owner_lasts_the_first_window_is_given_up_and_said() -> None:
    script = lost()
    wrote(script, NEXT, 2, 100 + FAR)
    script.take(ev.StreamLost(script.now, NEXT))
    script.pass_time(17_000)
    script.hello(3, "c")
    spec = told(script, 3)
    assert spec.recount == pb.RECOUNT_WANTED
    assert spec.vchannels[0].recount_ts == 100 + FAR, "its own is not"
    wrote(script, 3, 3, 200 + FAR, conditions=(("AUTO_ID_KEYS", "x"),))
    progress = script.core.world.progress[BOOKS]
    assert progress.conditions == (("AUTO_ID_KEYS", "x"), NOT_RECOUNTED)
    wrote(script, 3, 3, 300 + 2 * FAR)
    script.take(ev.Heartbeat(script.now, 3, 1, True))
    script.take(ev.Released(script.now, 3, BOOKS, 3))
    script.hello(4, "d")
    assert told(script, 4).recount == pb.RECOUNT_UNSPECIFIED


@pytest.mark.parametrize("verdict", list(Recounted))
def test_without_one_the_word_of_it_means_nothing(verdict: Recounted) -> None:
    script = writing()
    wrote(script, 1, 1, 110, recounted=verdict)
    assert pending(script) is None


def test_paused_meanwhile() -> None:
    script = lost()
    script.take(ev.PauseTask(script.now, 9, "tasks/copy", ""))
    let_go(script)
    assert pending(script) is not None


def stopped(script: Script, epoch: int, reason: str) -> None:
    """The owner cannot go on."""
    script.report(NEXT, BOOKS, epoch, state=ReportedState.FAILED, reason=reason)


def test_without_the_log_from_its_start_a_recount_is_given_up_and_said() -> None:
    script = lost()
    stopped(script, 2, "LOG_TRUNCATED")
    assert pending(script) is None
    assert NOT_RECOUNTED in script.core.world.progress[BOOKS].conditions
    assert script.core.world.collections["uid-copy"][11].failure is None
    assert script.core.world.grants[BOOKS].epoch == 3
    (shard,) = told(script).vchannels
    assert shard.recount_from == b""
    assert shard.read_from == b"p100"


def test_what_is_missing_in_the_log_without_a_recount_fails() -> None:
    script = lost()
    stopped(script, 2, "LOG_TRUNCATED")
    stopped(script, 3, "LOG_TRUNCATED")
    failure = script.core.world.collections["uid-copy"][11].failure
    assert failure is not None
    assert failure.reason == "LOG_TRUNCATED"


def test_other_failures_keep_a_recount() -> None:
    script = lost()
    stopped(script, 2, "SINK_ERROR")
    assert pending(script) is not None
    assert script.core.world.collections["uid-copy"][11].failure is not None
