"""Turns references to secrets into their values, below a configured name prefix and folders only.

Law: a reference comes from whoever may create a task and its value goes to an address of the same
person's choice, so what is not expressly allowed is refused, and no message shows a value.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from milvuscdc.v1 import secret_pb2

from milvus_cdc.errors import CdcError, UserError

_MAX_BYTES = 64 * 1024
_SECRET = secret_pb2.Secret.DESCRIPTOR.full_name
_LOOKS = 3
"""At a file that is swapped while it is read."""


class SecretResolver:
    """Errors are UserError SECRET_NOT_ALLOWED and SECRET_MISSING, naming the task's field."""

    def __init__(
        self,
        *,
        env_prefix: str,
        folders: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        who: str = "replicator",
    ) -> None:
        """`who` resolves: errors name the process whose configuration and files it is about."""
        if not env_prefix:
            raise ValueError("an empty prefix would allow every variable")
        self._env_prefix = env_prefix
        self._who = who
        self._folders = tuple(map(Path, folders))
        self._environ = os.environ if environ is None else environ

    def env(self, name: str, *, field: str) -> str:
        """Value of an environment variable; surrounding white space is not part of it."""
        if not name.startswith(self._env_prefix):
            raise UserError(
                "SECRET_NOT_ALLOWED",
                f"{field}: the environment variable {name} may not be used as a secret; this "
                f"{self._who} allows names that begin with {self._env_prefix} "
                "(secrets.envPrefix in its configuration)",
                field=field,
            )
        value = self._environ.get(name, "").strip()
        if not value:
            raise UserError(
                "SECRET_MISSING",
                f"{field}: the environment variable {name} is not set at this {self._who}; "
                f"set it there and start the {self._who} again",
                field=field,
            )
        return value

    def file(self, path: str, *, field: str) -> str:
        """Content of a file; surrounding white space is not part of it."""
        for look in range(_LOOKS):
            resolved = self._allowed(path, field)
            try:
                with resolved.open("rb") as stream:
                    content = stream.read(_MAX_BYTES + 1)
                value = content.decode("utf-8").strip()
                break
            except FileNotFoundError as error:
                # A mounted folder is swapped as a whole, by its symbolic link: the way led through
                # the one that has just gone.
                if look + 1 == _LOOKS or self._allowed(path, field) == resolved:
                    raise self._unreadable(path, field, error.strerror) from error
            except OSError as error:
                raise self._unreadable(path, field, error.strerror) from error
            except UnicodeDecodeError:
                # Not as its cause: it would carry the content along.
                raise self._unreadable(path, field, "it is not UTF-8 text") from None
        if not value or len(content) > _MAX_BYTES:
            what = "is empty" if not value else f"is larger than {_MAX_BYTES} bytes"
            raise UserError("SECRET_MISSING", f"{field}: the file {path} {what}", field=field)
        return value

    def _allowed(self, path: str, field: str) -> Path:
        """Where the path leads now: neither ".." nor a symbolic link leads out of an allowed
        folder, which may be a link itself.
        """
        wanted = Path(path)
        try:
            resolved = wanted.resolve()
            folders = [folder.resolve() for folder in self._folders]
        except (OSError, RuntimeError, ValueError):
            resolved, folders = wanted, []
        if not wanted.is_absolute() or not any(resolved.is_relative_to(each) for each in folders):
            allowed = ", ".join(map(str, self._folders)) or "none"
            raise UserError(
                "SECRET_NOT_ALLOWED",
                f"{field}: the file {path} may not be used as a secret; this {self._who} allows "
                f"absolute paths below: {allowed} (secrets.folders in its configuration)",
                field=field,
            )
        return resolved

    def _unreadable(self, path: str, field: str, what: str | None) -> UserError:
        return UserError(
            "SECRET_MISSING",
            f"{field}: the file {path} cannot be read at this {self._who}: {what}",
            field=field,
        )


NO_SECRETS = SecretResolver(env_prefix="-", environ={})
"""Allows none: no variable has such a name."""


class RecordingResolver(SecretResolver):
    """Remembers what it was asked for, to tell when something opened with it is out of date."""

    def __init__(self, behind: SecretResolver) -> None:
        self._behind = behind
        self._given: dict[tuple[str, str], bytes] = {}

    def env(self, name: str, *, field: str) -> str:
        return self._behind.env(name, field=field)

    def file(self, path: str, *, field: str) -> str:
        value = self._behind.file(path, field=field)
        self._given[path, field] = _digest(value)
        return value

    @property
    def changed(self) -> bool:
        """A file holds something else now. One that cannot be read counts as unchanged: what is
        open works on.
        """
        for (path, field), digest in self._given.items():
            try:
                if _digest(self._behind.file(path, field=field)) != digest:
                    return True
            except CdcError:
                continue
        return False


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()


def resolve(secrets: SecretResolver, secret: secret_pb2.Secret, field: str) -> str | None:
    """The value of a reference, None when it is unset; `field` is its place in the task."""
    match secret.WhichOneof("ref"):
        case "env":
            return secrets.env(secret.env, field=field)
        case "file":
            return secrets.file(secret.file, field=field)
        case "literal":
            return secret.literal
        case "sealed":
            raise UserError(
                "SECRET_SEALED",
                f"{field}: the secret is encrypted, and only the controller that has its key can "
                "open it; write it out again, or refer to it by env or file",
                field=field,
            )
        case _:
            return None


def live(
    secrets: SecretResolver, secret: secret_pb2.Secret, field: str
) -> Callable[[], str | None]:
    """For whoever needs a secret again and again: its value at that moment. While it cannot be
    read, the value from before counts. Raises as `resolve`, at once.
    """
    last = resolve(secrets, secret, field)

    def now() -> str | None:
        nonlocal last
        try:
            last = resolve(secrets, secret, field)
        except UserError:
            pass
        return last

    return now


def secrets_in(message: Message, path: str = "") -> Iterator[tuple[str, secret_pb2.Secret]]:
    """Every Secret in a message, with its place as users write it, for example
    `sink.milvus.token`.
    """
    for field in _ways(cast("Descriptor", message.DESCRIPTOR)):
        place = f"{path}.{field.name}" if path else field.name
        if field.is_repeated:
            for index, item in enumerate(getattr(message, field.name)):
                yield from _below(item, f"{place}[{index}]")
        elif message.HasField(field.name):
            yield from _below(getattr(message, field.name), place)


def _below(message: Message, path: str) -> Iterator[tuple[str, secret_pb2.Secret]]:
    if isinstance(message, secret_pb2.Secret):
        yield path, message
    else:
        yield from secrets_in(message, path)


@lru_cache(maxsize=512)
def _ways(kind: Descriptor) -> tuple[FieldDescriptor, ...]:
    """The fields below which there may be a Secret."""
    return tuple(
        field
        for field in kind.fields
        if field.message_type is not None and _leads(field.message_type, frozenset())
    )


def _leads(kind: Descriptor, seen: frozenset[str]) -> bool:
    if kind.full_name == _SECRET:
        return True
    if kind.GetOptions().map_entry or kind.full_name in seen:
        return False
    below = seen | {kind.full_name}
    return any(
        field.message_type is not None and _leads(field.message_type, below)
        for field in kind.fields
    )
