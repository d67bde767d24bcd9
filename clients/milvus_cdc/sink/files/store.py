"""Where files are kept: a local folder here, an S3-compatible store in `object_store`.

Laws: `put` and `create` publish whole objects, durable when they return; `create` succeeds for one
of several at once. Calls block, so they belong in a thread. Paths are relative, with `/`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError

URI_FIELD = "sink.files.uri"
Bytes = bytes | memoryview
TEMPORARY = ".tmp"
"""Ends the hidden names under which local files are written before they are published."""


@dataclass(frozen=True, slots=True)
class Entry:
    path: str
    size: int


class MissingError(Exception):
    """No object of that path."""


class Store(Protocol):
    """Errors are those of `milvus_cdc.errors`, and MissingError where it is said."""

    @property
    def uri(self) -> str:
        """For messages."""
        ...

    def probe(self) -> str:
        """Writes, reads and removes something, and says what the place is. Raises what is wrong."""
        ...

    def conditions(self) -> tuple[tuple[str, str], ...]:
        """(TYPE, message) pairs that a user should see."""
        ...

    def put(self, path: str, data: Bytes) -> None:
        """Replaces what was there."""
        ...

    def create(self, path: str, data: Bytes) -> bool:
        """False when there is something already. UnknownOutcomeError when it may be ours."""
        ...

    def get(self, path: str) -> bytes:
        """Raises MissingError."""
        ...

    def open(self, path: str) -> pa.NativeFile:
        """For reading here and there in it. Raises MissingError."""
        ...

    def entries(self, folder: str) -> list[Entry]:
        """Everything below it, at any depth; nothing when it is not there."""
        ...

    def folders(self, folder: str) -> list[str]:
        """Names of the folders right in it."""
        ...

    def remove(self, paths: Sequence[str]) -> None:
        """What is not there counts as removed."""
        ...


class LocalStore:
    """Below a folder that must exist: it may be a mount, and a missing one must not be made anew
    on the disk below it.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        self._known: set[Path] = set()
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"file://{self._root}"

    def probe(self) -> str:
        name = f".probe-{uuid.uuid4().hex}"
        if not self.create(name, b"probe") or self.get(name) != b"probe":
            raise RetryableError(
                "SINK_IO_ERROR", f"{self.uri} does not give back what was written", field=URI_FIELD
            )
        self.remove([name])
        return f"local folder {self._root}"

    def conditions(self) -> tuple[tuple[str, str], ...]:
        return ()

    def put(self, path: str, data: Bytes) -> None:
        with self._errors(path):
            target = self._target(path)
            temporary = self._temporary(target, data)
            try:
                os.replace(temporary, target)
            except OSError:
                _unlink(temporary)
                raise
            _sync(target.parent)

    def create(self, path: str, data: Bytes) -> bool:
        with self._errors(path):
            target = self._target(path)
            temporary = self._temporary(target, data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise UserError(
                        "LINKS_NEEDED",
                        f"the file system of {self.uri} has no hard links, without which two "
                        "writers cannot be told apart; use another one, or S3",
                        field=URI_FIELD,
                    ) from error
                raise
            finally:
                _unlink(temporary)
            try:
                _sync(target.parent)
            except OSError as error:
                raise UnknownOutcomeError(
                    "SINK_IO_ERROR",
                    f"{target} is there and may not last: {error.strerror}",
                    field=URI_FIELD,
                ) from error
            return True

    def get(self, path: str) -> bytes:
        with self._errors(path):
            try:
                return (self._root / path).read_bytes()
            except FileNotFoundError:
                raise MissingError(path) from None

    def open(self, path: str) -> pa.NativeFile:
        with self._errors(path):
            try:
                return pa.memory_map(str(self._root / path))
            except FileNotFoundError:
                raise MissingError(path) from None

    def entries(self, folder: str) -> list[Entry]:
        with self._errors(folder):
            return list(self._walk(self._root / folder))

    def _walk(self, folder: Path) -> Iterator[Entry]:
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(Path(entry.path))
                    continue
                with contextlib.suppress(FileNotFoundError):
                    size = entry.stat().st_size
                    yield Entry(str(Path(entry.path).relative_to(self._root)), size)

    def folders(self, folder: str) -> list[str]:
        with self._errors(folder):
            try:
                with os.scandir(self._root / folder) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())
            except FileNotFoundError:
                return []

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            with self._errors(path), contextlib.suppress(FileNotFoundError):
                (self._root / path).unlink()

    def _target(self, path: str) -> Path:
        target = self._root / path
        if not self._root.is_dir():
            raise UserError(
                "FOLDER_MISSING",
                f"the folder {self._root} is not there on this replicator; create or mount it",
                field=URI_FIELD,
            )
        self._make(target.parent)
        return target

    def _make(self, folder: Path) -> None:
        """A new folder is durable once its parent's entry is."""
        with self._lock:
            if folder == self._root or (folder in self._known and folder.is_dir()):
                return
        self._make(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            _sync(folder.parent)
        with self._lock:
            self._known.add(folder)

    def _temporary(self, target: Path, data: Bytes) -> Path:
        """Written and synced beside the target, hidden from whoever looks for rows."""
        path = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            try:
                view = memoryview(data).cast("B")
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            _unlink(path)
            raise
        return path

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _local_error(f"{self._root / path}", error) from error


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def _local_error(where: str, error: OSError) -> CdcError:
    text = f"{where}: {error.strerror or error}"
    if error.errno in _FULL:
        return RetryableError(
            "DISK_FULL",
            f"{text}; free some space there or enlarge it, then it goes on by itself",
            field=URI_FIELD,
        )
    if error.errno in _FORBIDDEN:
        return UserError(
            "SINK_PERMISSION_DENIED",
            f"{text}; let the replicator's user read and write there",
            field=URI_FIELD,
        )
    return RetryableError("SINK_IO_ERROR", text, field=URI_FIELD)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor: Any = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
