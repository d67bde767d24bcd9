"""Names at the sink: a task's `rename` rules, and what can be said of them before any collection is
there.

Laws: the first rule that matches counts, and only once; a `*` of a half captures that half's text
alone. What is said of sets of names is conservative: it may see a collision or a cycle that no
collection ever makes, it never misses one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from milvus_cdc.selection import Selection, covers, intersect, matches

NAME_LENGTH_MAX = 255
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FROM = re.compile(r"[A-Za-z0-9_]*\*?[A-Za-z0-9_]*")
_TO = re.compile(r"[A-Za-z_*][A-Za-z0-9_*]*")


@dataclass(frozen=True, slots=True)
class NameRule:
    """`database.collection` each; at most one `*` in each half."""

    source: str
    sink: str


Rules = tuple[NameRule, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a set of rules: an upper-case reason, words for people, and the index of
    the rule to blame.
    """

    reason: str
    message: str
    rule: int


def split(full_name: str) -> tuple[str, str]:
    """Database and collection of `database.collection`."""
    database, _, name = full_name.partition(".")
    return database, name


@lru_cache(maxsize=65536)
def sink_name(rules: Rules, full_name: str) -> str:
    """The `database.collection` at the sink for one at the source. It may be one that cannot exist:
    see `possible`.
    """
    for rule in rules:
        if matches(rule.source, full_name):
            return _image(rule, full_name)
    return full_name


def sink_database(rules: Rules, database: str) -> str:
    """Where a source database as a whole goes: by the first rule for all its collections; itself
    when there is none.
    """
    for rule in rules:
        head, tail = split(rule.source)
        if tail == "*" and matches(head, database):
            return _half(head, split(rule.sink)[0], database)
    return database


def possible(name: str) -> bool:
    """Whether Milvus takes it as the name of a database or collection (2.3.5: letters, digits and
    underscores, no digit first, at most 255).
    """
    return len(name) <= NAME_LENGTH_MAX and _NAME.fullmatch(name) is not None


def impossible_part(full_name: str) -> str:
    """The half of `database.collection` that cannot exist; empty when both can."""
    return next((half for half in split(full_name) if not possible(half)), "")


def check_rules(rules: Rules, selection: Selection) -> Fault | None:
    """What is wrong with them for this selection."""
    for index, rule in enumerate(rules):
        fault = _check_shape(rule, index)
        if fault is not None:
            return fault
    return _check_collisions(Naming(rules, selection))


def _check_shape(rule: NameRule, index: int) -> Fault | None:
    halves = zip(("database", "collection"), split(rule.source), split(rule.sink), strict=True)
    for what, source, sink in halves:
        if source.count("*") > 1 or sink.count("*") > 1:
            return Fault("RENAME_INVALID", f"the {what} half holds more than one `*`", index)
        if "*" in sink and "*" not in source:
            return Fault(
                "RENAME_INVALID",
                f"the {what} half of `to` has a `*` and that of `from` has none: "
                "there is nothing to put in",
                index,
            )
        if not _FROM.fullmatch(source):
            return Fault(
                "RENAME_INVALID",
                f"no {what} can be called {source!r}: names hold letters, digits and underscores; "
                "`*` stands for any run of them",
                index,
            )
        if not _TO.fullmatch(sink) or len(sink.replace("*", "")) > NAME_LENGTH_MAX:
            return Fault(
                "SINK_NAME_INVALID",
                f"no {what} can be called {sink!r} at the sink: a name holds letters, digits and "
                f"underscores, does not begin with a digit, and has at most {NAME_LENGTH_MAX} "
                "characters",
                index,
            )
    return None


# Sets of names, as globs.


@dataclass(frozen=True, slots=True)
class Flow:
    """Collections that one include glob and one rule (or none: -1) send to the sink; both globs may
    hold more names than really go that way.
    """

    source: str
    sink: str
    rule: int
    exact: bool
    """No two of the names in `source` get the same name at the sink."""


@dataclass(frozen=True, slots=True)
class Naming:
    """Rules and what they are applied to."""

    rules: Rules
    selection: Selection

    def flows(self) -> list[Flow]:
        """Every way that a selected collection can take."""
        found: list[Flow] = []
        for include in self.selection.include:
            for index, rule in enumerate(self.rules):
                if not _intersect(include, rule.source):
                    continue
                flow = _flow(include, rule, index)
                if not self._never(flow.source, self.rules[:index]):
                    found.append(flow)
            if not self._never(include, self.rules):
                found.append(Flow(include, include, -1, True))
        return list(dict.fromkeys(found))

    def _never(self, source: str, earlier: Sequence[NameRule]) -> bool:
        """Another rule comes first for all of it, or it is excluded."""
        return any(_covers(rule.source, source) for rule in earlier) or any(
            _covers(glob, source) for glob in self.selection.exclude
        )

    def meets(self, flow: Flow, other: Flow) -> bool:
        """Whether `flow`, one of these, can reach a name at the sink that the globs of `other`
        hold.
        """
        if not _wild(other.sink):
            return self._carries(flow, other.sink)
        if flow.rule >= 0:
            return True
        outside = (*self.selection.exclude, *(rule.source for rule in self.rules))
        return not any(_covers(glob, flow.sink) or _covers(glob, other.sink) for glob in outside)

    def feeds(self, flow: Flow, other: Naming, after: Flow) -> bool:
        """Whether what `flow`, one of these, writes could be read by `after`, one of `other`'s."""
        if not _intersect(flow.sink, after.source):
            return False
        mine = (*self.selection.exclude, *(rule.source for rule in self.rules))
        if flow.rule < 0 and any(_covers(glob, after.source) for glob in mine):
            return False
        return not any(_covers(glob, flow.sink) for glob in other.selection.exclude)

    def _carries(self, flow: Flow, name: str) -> bool:
        """Whether some source collection gets exactly this name by this way."""
        source = name
        if flow.rule >= 0:
            rule = self.rules[flow.rule]
            halves = []
            for old, new, narrow, half in zip(
                split(rule.source), split(rule.sink), split(flow.source), split(name), strict=True
            ):
                if "*" not in new:
                    if _wild(narrow):
                        return True  # one of many: which, does not matter
                    halves.append(narrow)
                elif matches(new, half):
                    halves.append(_half(new, old, half) if "*" in old else old)
                else:
                    return False
            source = ".".join(halves)
        first = next((i for i, rule in enumerate(self.rules) if matches(rule.source, source)), -1)
        return first == flow.rule and self.selection.selects(source)


def meeting(one: Naming, other: Naming) -> tuple[str, str] | None:
    """Two globs of names at their sources by which two tasks could own one name at a sink; None
    when they cannot.
    """
    theirs = other.flows()
    for left in one.flows():
        for right in theirs:
            if _intersect(left.sink, right.sink):
                if one.meets(left, right) and other.meets(right, left):
                    return left.source, right.source
    return None


def _check_collisions(naming: Naming) -> Fault | None:
    ways = naming.flows()
    for number, one in enumerate(ways):
        if not one.exact:
            return Fault(
                "NAME_COLLISION",
                f"several collections of {one.source} would get the name {one.sink} at the sink; "
                "put a `*` into `to` for each in `from`, or select one of them",
                one.rule,
            )
        for other in ways[number + 1 :]:
            if not _intersect(one.sink, other.sink):
                continue
            if one.rule == other.rule:
                if one.rule < 0 or not _apart(naming.rules[one.rule], one, other):
                    continue
            if naming.meets(one, other) and naming.meets(other, one):
                against, named = sorted((one, other), key=lambda flow: flow.rule)
                by = f"rename[{against.rule}]" if against.rule >= 0 else "its own name"
                return Fault(
                    "NAME_COLLISION",
                    f"{named.source} by this rule and {against.source} by {by} could get the same "
                    f"name at the sink ({named.sink} and {against.sink}); change one of them, or "
                    "exclude what is not meant",
                    named.rule,
                )
    return None


def _apart(rule: NameRule, one: Flow, other: Flow) -> bool:
    """Of one rule: two different collections of these could get the same name."""
    halves = zip(
        split(rule.source), split(rule.sink), split(one.source), split(other.source), strict=True
    )
    return any("*" in f and "*" not in t and left != right for f, t, left, right in halves)


def _flow(include: str, rule: NameRule, index: int) -> Flow:
    sources, sinks, exact = [], [], True
    for glob, source, sink in zip(
        split(include), split(rule.source), split(rule.sink), strict=True
    ):
        narrow = _narrow(glob, source)
        sources.append(narrow)
        sinks.append(_half(source, sink, narrow))
        exact = exact and ("*" in sink or not _wild(narrow))
    return Flow(".".join(sources), ".".join(sinks), index, exact)


def _narrow(glob: str, source: str) -> str:
    """A glob of names that match both: the narrower one where one covers the other."""
    return glob if _covers(source, glob) else source


def _intersect(a: str, b: str) -> bool:
    """With a quick look first: thousands of globs are compared with each other."""
    head_a, head_b = _head(a), _head(b)
    if not (head_a.startswith(head_b) or head_b.startswith(head_a)):
        return False
    return intersect(a, b)


def _covers(outer: str, inner: str) -> bool:
    if not _wild(outer):
        return outer == inner
    return inner.startswith(_head(outer)) and covers(outer, inner)


@lru_cache(maxsize=8192)
def _head(glob: str) -> str:
    """What every match begins with."""
    return re.split(r"[*?]", glob, maxsplit=1)[0]


def _wild(glob: str) -> bool:
    return "*" in glob or "?" in glob


def _image(rule: NameRule, full_name: str) -> str:
    halves = zip(split(rule.source), split(rule.sink), split(full_name), strict=True)
    return ".".join(_half(source, sink, name) for source, sink, name in halves)


def _half(source: str, sink: str, name: str) -> str:
    """`name`, a name or a narrower glob, carried from one half of a rule to the other."""
    if "*" not in sink:
        return sink
    before, _, after = source.partition("*")
    end = len(name) - len(after)
    if name.startswith(before) and name.endswith(after) and end >= len(before):
        captured = name[len(before) : end]
    else:
        captured = "*"
    return sink.replace("*", captured)
