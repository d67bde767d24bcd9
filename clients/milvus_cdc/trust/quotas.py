"""How much one caller may have under way at a time, so that it leaves room for the others.

Law: who is counted is known by a credential; where nobody is asked who he is, nobody is counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from milvus_cdc.trust.caller import Caller
from milvus_cdc.trust.refusal import Refusal

REASON = "PRINCIPAL_LIMIT"
CALLS, STREAMS = "limits.callsPerPrincipal", "limits.streamsPerPrincipal"


@dataclass(frozen=True, slots=True)
class Quotas:
    """Of each caller by name: calls of one answer, and streams of any kind."""

    calls: int
    streams: int


class Counted:
    """What is under way at one server."""

    def __init__(self, quotas: Quotas) -> None:
        self._most = {CALLS: quotas.calls, STREAMS: quotas.streams}
        self._open: dict[str, Counter[str]] = {key: Counter() for key in self._most}

    @contextlib.contextmanager
    def call(self, caller: Caller, streams: bool) -> Iterator[None]:
        """Around one call. Raises Refusal RESOURCE_EXHAUSTED with the limit and the principal."""
        if not caller.name:
            yield
            return
        key = STREAMS if streams else CALLS
        under_way, most = self._open[key], self._most[key]
        if under_way[caller.name] >= most:
            what = "streams" if streams else "calls"
            raise Refusal(
                "RESOURCE_EXHAUSTED",
                REASON,
                f"{caller.name} has {most} {what} under way already; end one, or raise {key} in "
                "the controller's configuration.",
                limit=key,
                principal=caller.name,
                most=str(most),
            )
        under_way[caller.name] += 1
        try:
            yield
        finally:
            under_way[caller.name] -= 1
            if not under_way[caller.name]:
                del under_way[caller.name]
