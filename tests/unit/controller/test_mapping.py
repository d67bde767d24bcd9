"""Names at the sink: by example, and against the obvious definition."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from milvus_cdc.selection import Selection
from milvus_cdc_controller.core.mapping import (
    NameRule,
    Naming,
    check_rules,
    impossible_part,
    meeting,
    possible,
    sink_database,
    sink_name,
)

HALF = st.text("ab", min_size=1, max_size=3)
GLOB_HALF = st.one_of(
    HALF,
    st.just("*"),
    st.builds("{}*{}".format, st.text("ab", max_size=1), st.text("ab", max_size=1)),
)
NAME = st.builds("{}.{}".format, HALF, HALF)
GLOB = st.builds("{}.{}".format, GLOB_HALF, GLOB_HALF)
RULE = st.builds(NameRule, GLOB, GLOB).filter(
    lambda rule: all(
        "*" in source or "*" not in sink
        for source, sink in zip(rule.source.split("."), rule.sink.split("."), strict=True)
    )
)
RULES = st.lists(RULE, max_size=3).map(tuple)
SELECTION = st.builds(
    Selection,
    st.lists(GLOB, min_size=1, max_size=2).map(tuple),
    st.lists(GLOB, max_size=1).map(tuple),
)
LIGHT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.lists(NAME, max_size=12)


def rules(*pairs: str) -> tuple[NameRule, ...]:
    return tuple(NameRule(*pair.split(" -> ")) for pair in pairs)


def obvious(mapping: tuple[NameRule, ...], name: str) -> str:
    for rule in mapping:
        (d, c), (nd, nc) = rule.source.split("."), rule.sink.split(".")
        pattern = r"\.".join(
            re.escape(half).replace(r"\*", f"(?P<{key}>[^.]*)")
            for key, half in (("d", d), ("c", c))
        )
        match = re.fullmatch(pattern, name)
        if match:
            groups = match.groupdict()
            return f"{nd.replace('*', groups.get('d', ''))}.{nc.replace('*', groups.get('c', ''))}"
    return name


@LIGHT
@given(RULES, NAME)
def test_the_first_rule_that_matches_counts_and_a_star_takes_its_own_half(
    mapping: tuple[NameRule, ...], name: str
) -> None:
    assert sink_name(mapping, name) == obvious(mapping, name)


@LIGHT
@given(RULES, SELECTION, NAMES)
def test_two_sources_never_get_one_name_by_rules_that_were_taken(
    mapping: tuple[NameRule, ...], selection: Selection, names: list[str]
) -> None:
    if check_rules(mapping, selection) is not None:
        return
    selected = {name for name in names if selection.selects(name)}
    assert len({sink_name(mapping, name) for name in selected}) == len(selected)


@LIGHT
@given(RULES, SELECTION, RULES, SELECTION, NAME, NAME)
def test_a_shared_name_at_the_sink_is_never_missed(
    mine: tuple[NameRule, ...],
    selection: Selection,
    theirs: tuple[NameRule, ...],
    other: Selection,
    a: str,
    b: str,
) -> None:
    if not (selection.selects(a) and other.selects(b)):
        return
    if sink_name(mine, a) == sink_name(theirs, b):
        assert meeting(Naming(mine, selection), Naming(theirs, other)) is not None


@pytest.mark.parametrize(
    ("pairs", "name", "there"),
    [
        (("shop.* -> mirror.*",), "shop.orders", "mirror.orders"),
        (("shop.orders -> archive.old", "shop.* -> mirror.*"), "shop.orders", "archive.old"),
        (("*.users -> *_eu.people",), "shop.users", "shop_eu.people"),
        (("*.* -> eu_*.*_v1",), "shop.users", "eu_shop.users_v1"),
        (("shop.tmp_* -> shop.*",), "shop.tmp_x", "shop.x"),
        (("shop.a -> shop.b", "shop.b -> shop.a"), "shop.a", "shop.b"),
        (("shop.a -> shop.b",), "default.a", "default.a"),
    ],
)
def test_examples(pairs: tuple[str, ...], name: str, there: str) -> None:
    assert sink_name(rules(*pairs), name) == there


@pytest.mark.parametrize(
    ("pairs", "include", "exclude", "fault"),
    [
        # An unmapped name that is selected stands where a rule leads.
        (("shop.a -> shop.b",), "shop.*", "", ("NAME_COLLISION", 0)),
        (("shop.a -> shop.b",), "shop.*", "shop.b", None),
        (("shop.a -> shop.b",), "shop.a", "", None),
        (("shop.a -> shop.b", "shop.b -> shop.a"), "shop.*", "", None),
        (("shop.a -> shop.b", "shop.b -> shop.c"), "shop.*", "", ("NAME_COLLISION", 1)),
        # Two rules.
        (("shop.* -> all.*", "blog.* -> all.*"), "*.*", "", ("NAME_COLLISION", 1)),
        (("shop.* -> all.shop_*", "blog.* -> all.blog_*"), "*.*", "all.*", None),
        (("shop.* -> all.shop_*", "blog.* -> all.blog_*"), "*.*", "", ("NAME_COLLISION", 0)),
        (("shop.a -> x.a", "shop.* -> x.*"), "shop.*", "", None),
        (("shop.a -> x.b", "shop.* -> x.*"), "shop.*", "", ("NAME_COLLISION", 1)),
        # One rule that forgets what it matched.
        (("*.users -> all.users",), "*.*", "", ("NAME_COLLISION", 0)),
        (("*.users -> all.users",), "shop.*", "", None),
        (("shop.* -> all.one",), "shop.*", "", ("NAME_COLLISION", 0)),
        # Shapes.
        (("shop.a -> shop.*",), "shop.*", "", ("RENAME_INVALID", 0)),
        (("shop.* -> *.a",), "shop.*", "", ("RENAME_INVALID", 0)),
        (("shop.*x* -> shop.*",), "shop.*", "", ("RENAME_INVALID", 0)),
        (("sh-op.a -> shop.b",), "shop.*", "", ("RENAME_INVALID", 0)),
        (("shop.a -> shop.b-c",), "shop.*", "", ("SINK_NAME_INVALID", 0)),
        (("shop.a -> shop.1b",), "shop.*", "", ("SINK_NAME_INVALID", 0)),
        (("q.q -> r.r", "shop.a -> shop.ä"), "shop.*", "", ("SINK_NAME_INVALID", 1)),
        ((f"shop.a -> shop.{'x' * 256}",), "shop.*", "", ("SINK_NAME_INVALID", 0)),
    ],
)
def test_what_is_refused(
    pairs: tuple[str, ...], include: str, exclude: str, fault: tuple[str, int] | None
) -> None:
    selection = Selection((include,), (exclude,) if exclude else ())
    found = check_rules(rules(*pairs), selection)
    assert (found and (found.reason, found.rule)) == fault


def test_a_whole_database_goes_where_the_rule_for_all_its_collections_says() -> None:
    mapping = rules("shop.orders -> archive.orders", "shop.* -> mirror.*", "*_eu.* -> eu_*.*")
    assert [sink_database(mapping, name) for name in ("shop", "x_eu", "blog")] == [
        "mirror",
        "eu_x",
        "blog",
    ]


def test_names_that_milvus_does_not_take() -> None:
    assert possible("_a1")
    assert not any(map(possible, ("", "1a", "a-b", "ä", "a b", "x" * 256)))
    assert impossible_part("ok.1") == "1"
    assert impossible_part("ok.fine") == ""


def test_a_thousand_rules_are_checked_in_no_time() -> None:
    many = rules(*(f"shop.c{n} -> mirror.c{n}" for n in range(1000)))
    selection = Selection(tuple(f"shop.c{n}" for n in range(1000)))
    assert check_rules(many, selection) is None
