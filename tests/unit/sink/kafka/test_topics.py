"""Names of topics: made by a template, legal, and nobody else's."""

from __future__ import annotations

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.sink.kafka.topics import DEFAULT_TOPIC, TopicTemplate

from tests.contract.kafka_samples import table_named


def template(text: str) -> TopicTemplate:
    return TopicTemplate(text, "topic")


def test_variables() -> None:
    table = table_named("products", database="shop")
    assert template(DEFAULT_TOPIC).topic(table) == "milvus.shop.products"
    assert template("{collection}-{database}.{collection}").topic(table) == "products-shop.products"
    assert template("all").topic(table) == "all"
    assert template("all").constant
    assert not template("{database}").constant


@pytest.mark.parametrize(
    "text", ["{topic}", "a.{Database}", "{}", "{database", "a b", "", ".", "é"]
)
def test_templates_that_cannot_work(text: str) -> None:
    with pytest.raises(UserError) as failed:
        template(text)
    assert (failed.value.reason, failed.value.field) == ("INVALID_FIELD", "sink.kafka.topic")


def test_names_that_kafka_does_not_take() -> None:
    for name, why in (("a$b", "contains '$'"), ("x" * 250, "longer than 249")):
        table = table_named(name)
        with pytest.raises(UserError, match="INVALID_TOPIC_NAME") as failed:
            template("{collection}").topic(table)
        assert why in failed.value.message
        (text,) = template("{collection}").violations([table])
        assert table.full_name in text
        assert "sink.kafka.topic" in text


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("milvus.{database}.{collection}", True),
        ("{collection}-of-{database}", True),
        ("{database}_{collection}", False),  # a_b of c, and b of c_a
        ("{collection}", False),
        ("{database}.{database}", False),
        ("all", False),
    ],
)
def test_whether_a_topic_is_of_one_collection(text: str, alone: bool) -> None:
    assert template(text).of_one_collection is alone


def test_collections_that_would_share_a_topic() -> None:
    one = table_named("c", database="a_b", collection_id=1)
    two = table_named("b_c", database="a", collection_id=2)
    assert template("{database}.{collection}").violations([one, two]) == [
        "a_b.c and a.b_c: the topics 'a_b.c' and 'a.b_c' differ only in '.' and '_', which Kafka "
        "does not take (sink.kafka.topic)"
    ]
    (text,) = template("{database}_{collection}").violations([one, two])
    assert "both have the topic 'a_b_c'" in text
    assert template("{database}-{collection}").violations([one, two]) == []
    # Said of all of them, it is meant.
    assert template("all").violations([one, two]) == []
