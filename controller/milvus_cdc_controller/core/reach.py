"""Which tasks could meet a selection at a sink, without looking at every task.

Law: who is not named certainly does not meet it; who is named has to be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from milvus_cdc_controller.core.task import TaskSpec


@dataclass(slots=True)
class _Sink:
    exact: dict[str, set[str]] = field(default_factory=dict)
    """Tasks by names that they select as they are, without wildcards or renames."""
    wide: dict[str, None] = field(default_factory=dict)
    """All others, in order."""


class Reach:
    """By sink; tasks by uid."""

    def __init__(self) -> None:
        self._sinks: dict[str, _Sink] = {}
        self._specs: dict[str, TaskSpec] = {}

    def put(self, uid: str, spec: TaskSpec) -> None:
        """Replaces what the task wanted before."""
        before = self._specs.get(uid)
        if before is not None and _same(before, spec):
            return
        self.drop(uid)
        self._specs[uid] = spec
        sink = self._sinks.setdefault(spec.sink_id, _Sink())
        names = _names(spec)
        if names is None:
            sink.wide[uid] = None
        else:
            for name in names:
                sink.exact.setdefault(name, set()).add(uid)

    def drop(self, uid: str) -> None:
        spec = self._specs.pop(uid, None)
        if spec is None:
            return
        sink = self._sinks[spec.sink_id]
        sink.wide.pop(uid, None)
        for name in _names(spec) or ():
            sink.exact[name].discard(uid)
            if not sink.exact[name]:
                del sink.exact[name]
        if not sink.exact and not sink.wide:
            del self._sinks[spec.sink_id]

    def candidates(self, spec: TaskSpec) -> list[str]:
        """Tasks that have to be compared with it."""
        sink = self._sinks.get(spec.sink_id)
        if sink is None:
            return []
        names = _names(spec)
        if names is None:
            exact = set().union(*sink.exact.values())
        else:
            exact = set().union(*(sink.exact.get(name, ()) for name in names))
        return [*sink.wide, *sorted(exact)]


def _names(spec: TaskSpec) -> frozenset[str] | None:
    """What it selects when that can be said name by name."""
    include = spec.selection.include
    if spec.rename or any("*" in glob or "?" in glob for glob in include):
        return None
    return frozenset(include)


def _same(a: TaskSpec, b: TaskSpec) -> bool:
    return (a.sink_id, a.selection, a.rename) == (b.sink_id, b.selection, b.rename)
