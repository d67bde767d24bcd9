"""The replicator's side of holds: the lowest place counts, each hold gets its answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.errors import BugError, LogResetError, UserError
from milvus_cdc.source.holds import HeldLog
from milvus_cdc.source.memory import MemorySource
from milvus_cdc.source.positions import encode
from milvus_cdc_replicator import holding
from milvus_cdc_replicator.holding import keep_holds
from milvuscdc.v1 import replication_service_pb2 as pb


class Held(MemorySource):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.holds: Any = self
        self.at: dict[str, bytes | None] = {}
        self.hangs = False

    def hold(self, pchannel: str, name: str) -> Any:
        return _Hold(self, pchannel, name)

    async def find(self) -> list[HeldLog]:
        return [HeldLog("t", "milvus-cdc-x", 3, 30)]

    async def warnings(self, pchannel: str) -> list[tuple[str, str]]:
        return [("HOLD_EXPIRES", f"of {pchannel}")]


class _Hold:
    def __init__(self, held: Held, pchannel: str, name: str) -> None:
        self._held, self._pchannel, self._name = held, pchannel, name

    async def advance(self, position: bytes | None) -> None:
        if self._held.hangs:
            await asyncio.sleep(3600)
        if self._pchannel == "missing":
            raise LogResetError("no such topic")
        self._held.at[self._name] = position

    async def release(self) -> None:
        self._held.at.pop(self._name, None)

    async def look(self) -> HeldLog:
        if self._pchannel == "secret":
            raise UserError("QUEUE_ACCESS_DENIED", "not you")
        return HeldLog(self._pchannel, self._name, 5, 50)


def place(name: str, *keep_from: bytes, pchannel: str = "t", release: bool = False) -> pb.HoldPlace:
    return pb.HoldPlace(pchannel=pchannel, name=name, keep_from=keep_from, release=release)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_the_lowest_place_of_all_stays(numbers: list[int]) -> None:
    source = Held()
    job = pb.HoldJob(places=[place("a", *map(encode, numbers))])
    asyncio.run(keep_holds(source, job))
    assert source.at == {"a": encode(min(numbers))}


async def test_each_hold_gets_its_answer() -> None:
    source = Held()
    source.at["old"] = b""
    job = pb.HoldJob(
        places=[
            place("new"),
            place("none", pchannel="missing"),
            place("bad", b"not a position"),
            place("old", release=True),
            place("blind", pchannel="secret"),
        ],
        look=True,
    )
    done = await keep_holds(source, job)
    assert source.at == {"new": None, "blind": None}
    assert [told.reason for told in done.places] == ["", "LOG_RESET", "BAD_POSITION", "", ""]
    assert [told.backlog_bytes for told in done.places] == [50, -1, -1, 0, -1]
    assert [told.name for told in done.found] == ["milvus-cdc-x"]
    assert [(w.reason, w.message) for w in done.warnings] == [("HOLD_EXPIRES", "of t")]


async def test_a_queue_that_does_not_answer_is_told_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holding, "HOLD_SECONDS", 0.05)
    source = Held()
    source.hangs = True
    done = await keep_holds(source, pb.HoldJob(places=[place("a"), place("b", release=True)]))
    assert [told.reason for told in done.places] == ["QUEUE_UNREACHABLE", ""]


async def test_a_queue_without_holds_is_a_mistake() -> None:
    with pytest.raises(BugError):
        await keep_holds(MemorySource(), pb.HoldJob(places=[place("a")]))
