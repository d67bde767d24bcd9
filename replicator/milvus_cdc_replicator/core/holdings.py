"""Which assignments this process runs, and what a word of the controller does to them.

Law: epochs decide. The same epoch is news about what runs already; a newer one replaces it and
starts from the checkpoints that came with it; an older one is an echo and changes nothing.
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


@dataclass(frozen=True, slots=True)
class Held:
    epoch: int
    version: int


class Holdings:
    """Invariant: epochs of one assignment only grow."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._last_epoch: dict[str, int] = {}

    def assign(self, assignment_id: str, epoch: int, version: int) -> Verdict:
        """Records it, unless stale."""
        held = self._held.get(assignment_id)
        if held is None:
            if epoch < self._last_epoch.get(assignment_id, 0):
                return Verdict.STALE
            verdict = Verdict.START
        elif epoch < held.epoch or (epoch == held.epoch and version < held.version):
            return Verdict.STALE
        else:
            verdict = Verdict.UPDATE if epoch == held.epoch else Verdict.REPLACE
        self._held[assignment_id] = Held(epoch, version)
        self._last_epoch[assignment_id] = epoch
        return verdict

    def revoke(self, assignment_id: str, epoch: int) -> bool:
        """True when something runs that must be stopped."""
        held = self._held.get(assignment_id)
        if held is None or held.epoch > epoch:
            return False
        del self._held[assignment_id]
        return True

    def all(self) -> dict[str, Held]:
        return dict(self._held)
