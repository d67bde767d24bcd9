"""Turns references to secrets into their values, below a configured name prefix and folders only.

Law: a reference comes from whoever may create a task and its value goes to an address of the same
person's choice, so what is not expressly allowed is refused, and no message shows a value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from milvuscdc.v1 import secret_pb2

from milvus_cdc.errors import UserError

_MAX_BYTES = 64 * 1024


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
        self._folders = tuple(Path(folder).resolve() for folder in folders)
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
        # Resolved first: neither ".." nor a symbolic link leads out of an allowed folder.
        wanted = Path(path)
        try:
            resolved = wanted.resolve()
        except (OSError, RuntimeError, ValueError):
            resolved = None
        if (
            resolved is None
            or not wanted.is_absolute()
            or not any(resolved.is_relative_to(folder) for folder in self._folders)
        ):
            allowed = ", ".join(map(str, self._folders)) or "none"
            raise UserError(
                "SECRET_NOT_ALLOWED",
                f"{field}: the file {path} may not be used as a secret; this {self._who} allows "
                f"absolute paths below: {allowed} (secrets.folders in its configuration)",
                field=field,
            )
        try:
            with resolved.open("rb") as stream:
                content = stream.read(_MAX_BYTES + 1)
            value = content.decode("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(
                "SECRET_MISSING",
                f"{field}: the file {path} cannot be read at this {self._who}: {what}",
                field=field,
            ) from error
        if not value or len(content) > _MAX_BYTES:
            what = "is empty" if not value else f"is larger than {_MAX_BYTES} bytes"
            raise UserError("SECRET_MISSING", f"{field}: the file {path} {what}", field=field)
        return value


def resolve(secrets: SecretResolver, secret: secret_pb2.Secret, field: str) -> str | None:
    """The value of a reference, None when it is unset; `field` is its place in the task."""
    match secret.WhichOneof("ref"):
        case "env":
            return secrets.env(secret.env, field=field)
        case "file":
            return secrets.file(secret.file, field=field)
        case _:
            return None
