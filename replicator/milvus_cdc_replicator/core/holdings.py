"""Which assignments this process runs, and what a word of the controller does to them.

Laws: epochs decide. The same epoch is news about what runs already; a newer one replaces it and
starts from the checkpoints that came with it; an older one is an echo and changes nothing. An epoch
that was let go is spent: its release may have been lost, or may be on its way while somebody else
gets the next one, so it never runs again and is answered with its release.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    START = "START"
    UPDATE = "UPDATE"
    REPLACE = "REPLACE"
    """Stop what runs, then start anew from the checkpoints given."""
    STALE = "STALE"
    SPENT = "SPENT"
    """Let go before: say Released once more."""


@dataclass(frozen=True, slots=True)
class Held:
    epoch: int
    version: int


class Holdings:
    """Invariant: epochs of one assignment only grow."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._spent: dict[str, int] = {}

    def assign(self, assignment_id: str, epoch: int, version: int) -> Verdict:
        """Records it, unless stale or spent."""
        held = self._held.get(assignment_id)
        if epoch <= self._spent.get(assignment_id, -1):
            return Verdict.SPENT
        if held is None:
            verdict = Verdict.START
        elif epoch < held.epoch or (epoch == held.epoch and version < held.version):
            return Verdict.STALE
        else:
            verdict = Verdict.UPDATE if epoch == held.epoch else Verdict.REPLACE
        self._held[assignment_id] = Held(epoch, version)
        return verdict

    def revoke(self, assignment_id: str, epoch: int) -> bool:
        """The epoch is spent. True when it or an older one was held."""
        self._spent[assignment_id] = max(epoch, self._spent.get(assignment_id, -1))
        held = self._held.get(assignment_id)
        if held is None or held.epoch > epoch:
            return False
        del self._held[assignment_id]
        return True

    def holds(self, assignment_id: str, epoch: int) -> bool:
        held = self._held.get(assignment_id)
        return held is not None and held.epoch == epoch

    def all(self) -> dict[str, Held]:
        return dict(self._held)
