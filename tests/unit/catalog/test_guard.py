"""When absence is evidence of a drop, and when it is not."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.catalog import Doubt, KnownSource, judge, learn
from milvus_cdc.model import Catalogue, Collection, Database, ObjectState

CREATED, DROPPED = ObjectState.CREATED, ObjectState.DROPPED


def collection(number: int, state: ObjectState = CREATED) -> Collection:
    return Collection(number, 1, "default", f"c{number}", b"", 1, 0, 0, state=state)


def catalogue(*collections: Collection) -> Catalogue:
    databases = (Database(1, "default"),)
    return Catalogue(5, 100, 1000, databases, collections, incarnation=9)


SOURCE = catalogue(*map(collection, range(10)))
KNOWN = learn(SOURCE, range(10))


def doubt(known: KnownSource | None, now: Catalogue) -> Doubt | None:
    objection = judge(known, now)
    return None if objection is None else objection.doubt


def test_the_same_source_is_believed() -> None:
    assert judge(KNOWN, SOURCE) is None
    assert judge(KNOWN, replace(SOURCE, revision=101, tso=1001)) is None
    assert judge(None, SOURCE) is None


def test_another_source_is_not() -> None:
    assert doubt(KNOWN, replace(SOURCE, cluster_id=6)) is Doubt.SOURCE_IDENTITY_CHANGED
    assert doubt(KNOWN, replace(SOURCE, revision=99)) is Doubt.SOURCE_IDENTITY_CHANGED
    assert doubt(KNOWN, replace(SOURCE, incarnation=8)) is Doubt.SOURCE_IDENTITY_CHANGED


def test_a_clock_that_went_back() -> None:
    assert doubt(KNOWN, replace(SOURCE, tso=999)) is Doubt.SOURCE_TSO_WENT_BACK


def test_missing_sentinels() -> None:
    for known in (None, KNOWN):
        assert doubt(known, replace(SOURCE, tso=0)) is Doubt.SOURCE_METADATA_MISSING
        without = replace(SOURCE, databases=(Database(7, "other"),))
        assert doubt(known, without) is Doubt.SOURCE_METADATA_MISSING


def test_a_22_source_has_no_database_key_but_does_not_lose_one() -> None:
    old = replace(SOURCE, databases_keyed=False, incarnation=0)
    assert judge(None, old) is None
    assert judge(learn(old, range(10)), old) is None
    assert judge(learn(old, range(10)), replace(SOURCE, revision=101)) is None
    assert doubt(KNOWN, old) is Doubt.SOURCE_METADATA_MISSING


def test_drops_that_were_seen_never_count() -> None:
    dropping = catalogue(*(collection(number, DROPPED) for number in range(10)))
    assert judge(KNOWN, dropping) is None
    assert judge(learn(dropping, range(10)), catalogue()) is None


def test_drops_of_what_nobody_follows_never_count() -> None:
    assert judge(learn(SOURCE, ()), catalogue()) is None


def test_a_mass_drop_names_the_missing() -> None:
    objection = judge(KNOWN, catalogue(*map(collection, range(4))))
    assert objection is not None
    assert objection.doubt is Doubt.SOURCE_MASS_DROP
    assert objection.vanished == frozenset(range(4, 10))


IDS = st.frozensets(st.integers(0, 30))


@given(followed=IDS, alive=IDS, seen_dropped=IDS, left=IDS)
def test_only_many_unseen_drops_are_doubted(
    followed: frozenset[int],
    alive: frozenset[int],
    seen_dropped: frozenset[int],
    left: frozenset[int],
) -> None:
    before = catalogue(
        *(collection(n, DROPPED if n in seen_dropped else CREATED) for n in sorted(alive))
    )
    known = learn(before, followed)
    assert known.alive == (followed & alive) - seen_dropped
    unseen = known.alive - left
    objection = judge(known, catalogue(*map(collection, sorted(left))))
    many = len(unseen) > 3 and len(unseen) * 2 > len(known.alive)
    assert (objection is not None) == many
    if objection is not None:
        assert (objection.doubt, objection.vanished) == (Doubt.SOURCE_MASS_DROP, unseen)


@given(
    cluster_id=st.sampled_from([5, 6]),
    tso=st.integers(0, 2000),
    revision=st.integers(0, 200),
    default=st.booleans(),
)
def test_a_doubtful_source_is_never_believed(
    cluster_id: int, tso: int, revision: int, default: bool
) -> None:
    now = replace(
        SOURCE,
        cluster_id=cluster_id,
        tso=tso,
        revision=revision,
        databases=SOURCE.databases if default else (),
    )
    sound = cluster_id == 5 and tso >= 1000 and revision >= 100 and default
    assert (judge(KNOWN, now) is None) == sound
