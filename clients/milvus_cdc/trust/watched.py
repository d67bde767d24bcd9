"""Files that are replaced while we run: certificates, keys, tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from milvus_cdc.errors import UserError

log = structlog.get_logger(__name__)

FILE_BYTES_MAX = 1024 * 1024

T = TypeVar("T")
_Signature = tuple[tuple[int, int, int, int] | None, ...]


def read(path: Path, field: str) -> bytes:
    """Raises UserError FILE_UNREADABLE that names the key."""
    try:
        with path.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UserError(
            "FILE_UNREADABLE", f"{field}: {path} cannot be read: {error.strerror}", field=field
        ) from error
    if len(content) > FILE_BYTES_MAX:
        raise UserError(
            "FILE_UNREADABLE", f"{field}: {path} has more than {FILE_BYTES_MAX} bytes", field=field
        )
    return content


class Watched(Generic[T]):
    """What some files say together. Those that belong together are replaced one after the other, so
    what does not fit yet is no failure: the last good state stays, with a warning.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, Path]],
        parse: Callable[[Sequence[bytes]], T],
        *,
        look_seconds: float = 0.0,
    ) -> None:
        """`files` with the keys that name them. They are looked at again at most every
        `look_seconds`. Raises UserError FILE_UNREADABLE and what `parse` raises.
        """
        self._files = tuple(files)
        self._parse = parse
        self._look_seconds = look_seconds
        self._looked = time.monotonic()
        self._seen = self._signature()
        self._value = self._load()
        self.generation = 0
        """One more with every good change."""

    def get(self) -> T:
        """The newest good state."""
        now = time.monotonic()
        if now - self._looked < self._look_seconds:
            return self._value
        self._looked = now
        signature = self._signature()
        if signature == self._seen:
            return self._value
        self._seen = signature
        try:
            self._value = self._load()
        except UserError as error:
            log.warning(
                "a changed file cannot be used, the one before stays in use",
                files=[str(path) for _, path in self._files],
                reason=error.reason,
                error=error.message,
            )
        else:
            self.generation += 1
            log.info("read anew", files=[str(path) for _, path in self._files])
        return self._value

    def _load(self) -> T:
        return self._parse([read(path, field) for field, path in self._files])

    def _signature(self) -> _Signature:
        found: list[tuple[int, int, int, int] | None] = []
        for _, path in self._files:
            try:
                stat = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(found)
