"""Globs over `database.collection`: case-sensitive, `*` any run of characters, `?` exactly one.

Law: the overlap of two selections is decided conservatively: it may name one that no collection
ever meets, it never misses one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_NO_NAME = re.compile(r"[^A-Za-z0-9_$*?.]")


@dataclass(frozen=True, slots=True)
class Selection:
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    def selects(self, full_name: str) -> bool:
        """Whether a `database.collection` is followed."""
        return any(matches(glob, full_name) for glob in self.include) and not any(
            matches(glob, full_name) for glob in self.exclude
        )

    def selects_database(self, database: str) -> bool:
        """Whether some collection of this database could be followed."""
        if not any(matches(glob.partition(".")[0], database) for glob in self.include):
            return False
        return not any(
            matches(head, database) and tail == "*"
            for head, _, tail in (glob.partition(".") for glob in self.exclude)
        )


def wildcards(globs: Iterable[str]) -> int:
    """Characters of those that hold a wildcard: what comparing them with others costs."""
    return sum(len(glob) for glob in globs if "*" in glob or "?" in glob)


def selects_nothing(selection: Selection) -> tuple[int, str] | None:
    """Index of an include glob by which no collection can ever be followed, and why."""
    for index, glob in enumerate(selection.include):
        strange = sorted(set(_NO_NAME.findall(glob)))
        if strange:
            return index, f"no name at a Milvus holds {strange[0]!r}"
    if all(any(covers(out, glob) for out in selection.exclude) for glob in selection.include):
        return 0, "`exclude` takes out everything that `include` selects"
    return None


@lru_cache(maxsize=65536)
def matches(glob: str, text: str) -> bool:
    """In steps that grow with the sum of the lengths, whatever the glob."""
    if "?" in glob:
        return _takes(glob, text, single="", run="")
    head, *rest = glob.split("*")
    if not rest:
        return glob == text
    tail = rest.pop()
    if len(text) < len(head) + len(tail) or not text.startswith(head) or not text.endswith(tail):
        return False
    at, end = len(head), len(text) - len(tail)
    for part in rest:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def intersect(a: str, b: str) -> bool:
    """Whether some text matches both globs."""
    if "*" not in a:
        return _takes(b, a, single="?", run="")
    if "*" not in b:
        return _takes(a, b, single="?", run="")
    # Between what they begin and end with, each can hold all that the other one asks for.
    (head_a, _, rest_a), (head_b, _, rest_b) = a.partition("*"), b.partition("*")
    tail_a, tail_b = rest_a.rpartition("*")[2], rest_b.rpartition("*")[2]
    return _agree(head_a, head_b) and _agree(tail_a[::-1], tail_b[::-1])


def _agree(a: str, b: str) -> bool:
    """Over the length of the shorter one."""
    return all(x == y or "?" in (x, y) for x, y in zip(a, b, strict=False))


def covers(outer: str, inner: str) -> bool:
    """Whether all that `inner` matches is surely matched by `outer` (sound, not complete)."""
    if "*" not in outer and ("*" in inner or len(outer) != len(inner)):
        return False
    return _takes(outer, inner, single="", run="*")


def _takes(glob: str, text: str, *, single: str, run: str) -> bool:
    """Whether the glob matches the text, in which `single` stands for any one character of the
    glob's choice, and `run` is taken only by a `*` of the glob.

    All places in the glob where one can be are the bits of a number, so that each character of the
    text is one step: no glob makes it go back.
    """
    masks: dict[str, int] = {}
    anything = stay = 0
    place = 1
    for char in glob:
        if char == "*":
            stay |= place
            continue
        if char == "?":
            anything |= place
        else:
            masks[char] = masks.get(char, 0) | place
        place <<= 1
    here = 1
    for char in text:
        if char == single:
            step = here
        elif char == run:
            step = 0
        else:
            step = here & (masks.get(char, 0) | anything)
        here = step << 1 | here & stay
        if not here:
            return False
    return bool(here & place)


def overlap(a: Selection, b: Selection) -> tuple[str, str] | None:
    """A pair of include globs that both selections could follow a collection by; None when they
    are disjoint.

    A glob that lies wholly below an exclude of either selection does not count.
    """
    excludes = a.exclude + b.exclude
    left = [glob for glob in a.include if not any(covers(out, glob) for out in excludes)]
    right = [glob for glob in b.include if not any(covers(out, glob) for out in excludes)]
    for one in left:
        for other in right:
            if intersect(one, other):
                return one, other
    return None
