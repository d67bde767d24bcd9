"""What can be said of Pulsar's positions and its REST API without a broker."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.source import PulsarConfig, positions
from milvus_cdc.source.pulsar_admin import PulsarAdmin
from milvus_cdc.source.pulsar_positions import Place, decode, encode, order
from milvus_cdc.source.registry import position_text

IDS = st.integers(0, 2**63 - 1)
PLACES = st.builds(Place, IDS, IDS, st.integers(0, 2**31 - 1))


@given(PLACES, PLACES)
def test_places_keep_their_order_as_positions(one: Place, other: Place) -> None:
    assert decode(encode(one)) == one
    assert (order(one) < order(other)) == (one < other)
    assert order(one) + 1 == order(one.after) or one.batch == 2**31 - 1


@given(PLACES, st.integers(0, 2**48 - 1))
def test_a_position_is_shown_as_its_queue_shows_it(place: Place, offset: int) -> None:
    assert position_text(encode(place)) == str(place)
    assert position_text(positions.encode(offset)) == str(offset)


class _Redirecting(PulsarAdmin):
    """A REST API that sends everybody on."""

    def __init__(self, config: PulsarConfig, target: str) -> None:
        super().__init__(config)
        self._target = target
        self.asked: list[str] = []

    def _ask(self, url: httpx.URL) -> httpx.Response:
        self.asked.append(str(url))
        return httpx.Response(307, headers={"Location": self._target})


def test_a_token_does_not_follow_from_tls_to_plaintext() -> None:
    config = PulsarConfig("pulsar+ssl://a:1", "https://a:2", token=lambda: "secret")
    admin = _Redirecting(config, "http://b:3/admin/v2/elsewhere")
    with pytest.raises(UserError, match="QUEUE_REDIRECT_REFUSED") as refused:
        admin.probe()
    assert refused.value.field == "source.pulsar.admin_url"
    assert len(admin.asked) == 1
    assert "secret" not in str(refused.value)


def test_redirects_without_end_come_to_one() -> None:
    admin = _Redirecting(PulsarConfig("pulsar://a:1", "http://a:2"), "http://b:3/again")
    with pytest.raises(RetryableError, match="QUEUE_UNREACHABLE"):
        admin.probe()
    assert len(admin.asked) < 10
