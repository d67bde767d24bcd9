"""Who calls, in which roles."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson


class Role(StrEnum):
    """`CONTROLLER` may speak for others, and nothing else."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    REPLICATOR = "replicator"
    CONTROLLER = "controller"


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody whose word about himself was checked."""

    name: str
    by: str
    """`certificate`, `token` or `jwt`; empty where nobody is asked who he is."""
    roles: frozenset[Role]
    replicator: str = ""
    """The only replicator that he may be; any when empty."""
    until: float = float("inf")
    """Unix time at which his word ends."""

    def told(self) -> bytes:
        """For another controller."""
        return orjson.dumps(
            {
                "name": self.name,
                "by": self.by,
                "roles": sorted(self.roles),
                "replicator": self.replicator,
            }
        )


def heard(told: bytes) -> Caller:
    """Of `Caller.told`. Raises ValueError."""
    body: Any = orjson.loads(told)
    try:
        return Caller(
            str(body["name"]),
            str(body["by"]),
            # What a newer one knows gives no right here.
            frozenset(Role(role) for role in body["roles"] if role in set(Role))
            - {Role.CONTROLLER},
            str(body["replicator"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError("no caller") from error


ANYBODY = Caller("", "", frozenset(Role) - {Role.CONTROLLER})
"""Where nobody is asked who he is."""

_CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current() -> Caller:
    """Of the call that is being handled."""
    return _CALLER.get()


def enter(caller: Caller) -> None:
    """For the rest of this task."""
    _CALLER.set(caller)
