"""A reign that ends: whoever waits for something of it is told to try again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from milvus_cdc_controller.api_errors import of
from milvus_cdc_controller.core import events as ev
from milvus_cdc_controller.core.jobs import JobFailed, ResolveJob
from milvus_cdc_controller.metrics import Metrics
from milvus_cdc_controller.reign import Reign
from milvus_cdc_controller.store import LeadershipLost

from tests.integration.controller_harness import BreakableStore, HandFedSource, config


class DoubtfulStore(BreakableStore):
    """One whose term ends when the test says so."""

    certain = True


def pause(at: ev.Instant, call: int) -> ev.Command:
    return ev.PauseTask(at, call, "tasks/none", "")


async def test_who_waits_is_told_and_who_comes_later_too(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await DoubtfulStore.open(path)
    assert isinstance(store, DoubtfulStore)
    reign = await Reign.prepare(config(path), store, Metrics(), HandFedSource().connect)
    lost = LeadershipLost("Another one leads.")
    # Nothing is stepped yet, so all of this waits.
    calling = asyncio.create_task(reign.loop.call(pause))
    job = await reign.loop.begin_job(ResolveJob(b"", ()))
    await asyncio.sleep(0)
    assert reign.leads
    reign.start()
    await reign.end(lost, drain=False)
    assert not reign.leads
    with pytest.raises(LeadershipLost):
        await calling
    result, last = await reign.loop.next_of_job(job)
    assert last
    assert isinstance(result, JobFailed)
    assert (result.reason, result.transient) == ("LEADERSHIP_LOST", True)
    with pytest.raises(LeadershipLost) as refused:
        await reign.loop.call(pause)
    told = of(refused.value)
    assert (told.kind, told.reason) == ("UNAVAILABLE", "LEADERSHIP_LOST")
    with pytest.raises(LeadershipLost):
        await reign.loop.begin_job(ResolveJob(b"", ()))
    await reign.loop.end_job(job)
    await reign.loop.post(ev.Ticked)
    await store.close()


async def test_who_no_longer_leads_for_certain_answers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await DoubtfulStore.open(path)
    assert isinstance(store, DoubtfulStore)
    reign = await Reign.prepare(config(path), store, Metrics(), HandFedSource().connect)
    reign.start()
    store.certain = False
    assert not reign.leads
    # A command that is refused needs no commit: its answer must not leave either.
    calling = asyncio.create_task(reign.loop.call(pause))
    await asyncio.sleep(0.2)
    assert not calling.done()
    await reign.end(LeadershipLost("Another one leads."), drain=False)
    with pytest.raises(LeadershipLost):
        await calling
    await store.close()
