"""Who changed what: one line of the log for each call that changes something, and for each call
that was refused. It is written whatever `log.level` is, and holds no part of a message but names.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import structlog

from milvus_cdc.trust.caller import Caller

EVENT = "audit"
REFUSALS_PER_SECOND = 20
"""Of strangers, and of those who ask too much: written one by one; more of them are counted in a
later line.
"""
CHARACTERS_MAX = 256
_TOO_MUCH = "RESOURCE_EXHAUSTED"
_NAMES = ("name", "parent", "replicator", "collection", "validate_only", "force")

log: Any = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)
)


class Audit:
    """Of one server."""

    def __init__(self) -> None:
        self._second = 0
        self._written = 0
        self._left_out = 0

    def call(
        self,
        caller: Caller | None,
        origin: str,
        method: str,
        request: Any,
        code: str,
        reason: str,
        *,
        passed_on: bool = False,
    ) -> None:
        """`caller` None: nobody knows who it was. `passed_on`: the leader has a line, too."""
        more: dict[str, Any] = {}
        if caller is None or code == _TOO_MUCH:
            if not self._room():
                return
            if self._left_out:
                more["refused_before_without_a_line"], self._left_out = self._left_out, 0
        if caller is not None:
            more |= {"principal": caller.name, "by": caller.by or "nobody is asked"}
        if passed_on:
            more["passed_on"] = True
        log.info(
            EVENT,
            method=_short(method),
            origin=_short(origin),
            code=code,
            **({"reason": reason} if reason else {}),
            **more,
            **_about(request),
        )

    def _room(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        if self._written <= REFUSALS_PER_SECOND:
            return True
        self._left_out += 1
        return False


def _about(request: Any) -> dict[str, Any]:
    """What the request names."""
    fields = getattr(getattr(request, "DESCRIPTOR", None), "fields_by_name", {})
    about: dict[str, Any] = {}
    if "task" in fields and fields["task"].message_type is not None:
        about["resource"] = _short(request.task.name)
    for name in _NAMES:
        if name not in fields:
            continue
        value = getattr(request, name)
        if isinstance(value, str) and value:
            about["resource" if name in ("name", "parent") else name] = _short(value)
        elif value is True:
            about[name] = True
    return about


def _short(text: str) -> str:
    clean = "".join(letter if letter.isprintable() else "?" for letter in text[:CHARACTERS_MAX])
    return clean if len(text) <= CHARACTERS_MAX else f"{clean}..."
