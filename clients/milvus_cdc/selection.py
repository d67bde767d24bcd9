"""Globs over `database.collection`: case-sensitive, `*` any run of characters, `?` exactly one.

Law: the overlap of two selections is decided conservatively: it may name one that no collection
ever meets, it never misses one.
"""

from __future__ import annotations

import re
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
    """Linear with one backtrack point, so that no pattern can make it slow."""
    g = t = 0
    star, mark = -1, 0
    while t < len(text):
        if g < len(glob) and glob[g] == "*":
            star, mark = g, t
            g += 1
        elif g < len(glob) and glob[g] in ("?", text[t]):
            g += 1
            t += 1
        elif star >= 0:
            mark += 1
            g, t = star + 1, mark
        else:
            return False
    return all(char == "*" for char in glob[g:])


def intersect(a: str, b: str) -> bool:
    """Whether some text matches both globs."""
    for left, right in zip(a, b, strict=False):
        if left == "*" or right == "*":
            break
        if left != right and "?" not in (left, right):
            return False
    reach = {(0, 0)}
    todo = [(0, 0)]

    def visit(i: int, j: int) -> None:
        if (i, j) not in reach:
            reach.add((i, j))
            todo.append((i, j))

    while todo:
        i, j = todo.pop()
        if i == len(a) and j == len(b):
            return True
        star_a = i < len(a) and a[i] == "*"
        star_b = j < len(b) and b[j] == "*"
        if star_a:
            visit(i + 1, j)
            if j < len(b):
                visit(i, j + 1)
        if star_b:
            visit(i, j + 1)
            if i < len(a):
                visit(i + 1, j)
        if not star_a and not star_b and i < len(a) and j < len(b):
            if a[i] == b[j] or "?" in (a[i], b[j]):
                visit(i + 1, j + 1)
    return False


def covers(outer: str, inner: str) -> bool:
    """Whether all that `inner` matches is surely matched by `outer` (sound, not complete)."""
    reach = {(0, 0)}
    todo = [(0, 0)]
    while todo:
        i, j = todo.pop()
        if i == len(outer):
            if j == len(inner):
                return True
            continue
        steps: list[tuple[int, int]] = []
        if outer[i] == "*":
            steps.append((i + 1, j))
            if j < len(inner):
                steps.append((i, j + 1))
        elif j < len(inner) and inner[j] != "*" and outer[i] in ("?", inner[j]):
            steps.append((i + 1, j + 1))
        for step in steps:
            if step not in reach:
                reach.add(step)
                todo.append(step)
    return False


def overlap(a: Selection, b: Selection) -> tuple[str, str] | None:
    """A pair of include globs that both selections could follow a collection by; None when they
    are disjoint.

    A pair whose one side lies wholly below an exclude of either selection does not count.
    """
    excludes = a.exclude + b.exclude
    for left in a.include:
        for right in b.include:
            if not intersect(left, right):
                continue
            if any(covers(out, left) or covers(out, right) for out in excludes):
                continue
            return left, right
    return None
