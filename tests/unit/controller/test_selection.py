"""Globs, against the obvious definition."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.selection import (
    Selection,
    _takes,
    covers,
    intersect,
    matches,
    overlap,
    selects_nothing,
)

GLOB = st.text("ab.*?", max_size=6)
TEXT = st.text("ab.", max_size=6)


def obvious(glob: str, text: str) -> bool:
    pattern = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in glob)
    return re.fullmatch(pattern, text) is not None


@given(GLOB, TEXT)
def test_matches(glob: str, text: str) -> None:
    assert matches(glob, text) == obvious(glob, text)


@given(GLOB, GLOB, TEXT)
def test_what_matches_both_makes_them_intersect(a: str, b: str, text: str) -> None:
    if matches(a, text) and matches(b, text):
        assert intersect(a, b)


@given(GLOB, GLOB, TEXT)
def test_what_is_covered_is_matched(outer: str, inner: str, text: str) -> None:
    if covers(outer, inner) and matches(inner, text):
        assert matches(outer, text)


BUILD = st.sampled_from(["a", "*", "?", "a*", "*a", "?*", "aab", "*a?b"])
LONG = st.builds(lambda piece, times: piece * times, BUILD, st.integers(1, 128))


class Steps(str):
    """A text that counts how often a character of it is looked at."""

    looked = 0

    def __iter__(self) -> Iterator[str]:
        for char in super().__iter__():
            Steps.looked += 1
            yield char


@given(LONG, LONG, st.sampled_from("ab."))
def test_no_glob_makes_anything_go_back(a: str, b: str, last: str) -> None:
    """Each character of the text is looked at once, and one step is a few operations on bits."""
    for glob, text in ((a, b + last), (b, a + last)):
        for single, run in (("", ""), ("?", ""), ("", "*")):
            Steps.looked = 0
            _takes(glob, Steps(text), single=single, run=run)
            assert Steps.looked <= len(text)


@given(GLOB, GLOB)
def test_covering_and_meeting_are_told_as_by_trying_all_ways(outer: str, inner: str) -> None:
    assert intersect(outer, inner) == intersect(inner, outer)
    assert intersect(outer, inner) == _meet(outer, inner)


def _meet(a: str, b: str) -> bool:
    """By trying."""
    if not a and not b:
        return True
    return bool(
        (a[:1] == "*" and (_meet(a[1:], b) or (b and _meet(a, b[1:]))))
        or (b[:1] == "*" and (_meet(a, b[1:]) or (a and _meet(a[1:], b))))
        or (
            a
            and b
            and "*" not in (a[0], b[0])
            and (a[0] == b[0] or "?" in (a[0], b[0]))
            and _meet(a[1:], b[1:])
        )
    )


PATTERNS = st.lists(GLOB, min_size=1, max_size=3).map(tuple)


@given(PATTERNS, PATTERNS, PATTERNS, PATTERNS, TEXT)
def test_a_shared_collection_is_never_missed(
    a: tuple[str, ...], b: tuple[str, ...], x: tuple[str, ...], y: tuple[str, ...], text: str
) -> None:
    left, right = Selection(a, x), Selection(b, y)
    if left.selects(text) and right.selects(text):
        assert overlap(left, right) is not None


def test_globs_that_can_never_select_anything_are_known() -> None:
    assert selects_nothing(Selection(("shop.*", "sh-op.*"))) == (
        1,
        "no name at a Milvus holds '-'",
    )
    assert selects_nothing(Selection(("shop.*", "blog.a"), ("shop.*", "*.a"))) is not None
    assert selects_nothing(Selection(("shop.*", "blog.a"), ("shop.*",))) is None


def test_case_counts_and_excludes_win() -> None:
    selection = Selection(("default.*",), ("default.scratch_*",))
    assert selection.selects("default.books")
    assert not selection.selects("Default.books")
    assert not selection.selects("default.scratch_1")
    assert overlap(Selection(("*.*",), ("shop.*",)), Selection(("shop.*",))) is None
