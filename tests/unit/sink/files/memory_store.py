"""A store in memory that fails when it is told to: before or after the effect of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TypeVar

import pyarrow as pa
from milvus_cdc.errors import RetryableError, UnknownOutcomeError
from milvus_cdc.sink.files.store import Bytes, Entry, MissingError

T = TypeVar("T")


class Crash(BaseException):
    """The process ends here."""


class Fault(StrEnum):
    CRASH_BEFORE = "CRASH_BEFORE"
    CRASH_AFTER = "CRASH_AFTER"
    FAIL = "FAIL"
    """Nothing happened, and it says so."""
    LOST_ANSWER = "LOST_ANSWER"
    """It happened, and the caller is not told."""
    LATE = "LATE"
    """The caller is told nothing, and it happens during the next call."""


class MemoryStore:
    """`faults` are taken in order, one for each call that writes; None is none."""

    uri = "memory:"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault | None] = []
        self._late: Callable[[], object] | None = None

    def probe(self) -> str:
        return "memory"

    def conditions(self) -> tuple[tuple[str, str], ...]:
        return ()

    def _do(self, effect: Callable[[], T]) -> T:
        if self._late is not None:
            late, self._late = self._late, None
            late()
        fault = self.faults.pop(0) if self.faults else None
        match fault:
            case None:
                return effect()
            case Fault.CRASH_BEFORE:
                raise Crash
            case Fault.CRASH_AFTER:
                effect()
                raise Crash
            case Fault.FAIL:
                raise RetryableError("SINK_UNAVAILABLE", "told to")
            case Fault.LOST_ANSWER:
                effect()
            case Fault.LATE:
                self._late = effect
        raise UnknownOutcomeError("SINK_UNAVAILABLE", "told to")

    def put(self, path: str, data: Bytes) -> None:
        held = bytes(data)

        def effect() -> None:
            self.objects[path] = held

        self._do(effect)

    def create(self, path: str, data: Bytes) -> bool:
        held = bytes(data)
        return self._do(lambda: self.objects.setdefault(path, held) is held)

    def remove(self, paths: Sequence[str]) -> None:
        def effect() -> None:
            for path in paths:
                self.objects.pop(path, None)

        self._do(effect)

    def get(self, path: str) -> bytes:
        if path not in self.objects:
            raise MissingError(path)
        return self.objects[path]

    def open(self, path: str) -> pa.NativeFile:
        return pa.BufferReader(self.get(path))

    def entries(self, folder: str) -> list[Entry]:
        found = [path for path in sorted(self.objects) if path.startswith(f"{folder}/")]
        return [Entry(path, len(self.objects[path])) for path in found]

    def folders(self, folder: str) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        rest = [path[len(prefix) :] for path in self.objects if path.startswith(prefix)]
        return sorted({each.partition("/")[0] for each in rest if "/" in each})
