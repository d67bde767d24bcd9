"""When a provider is asked for a token of Pulsar, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from milvus_cdc.errors import RetryableError, UserError
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.source.pulsar_oauth import STANDS_SECONDS, OauthTokens, renewed
from milvuscdc.v1 import secret_pb2, task_pb2

from tests.contract.identity_provider import Provider, openid_provider


class Tokens(OauthTokens):
    """With a clock and a secret that tests set."""

    def __init__(self, provider: Provider) -> None:
        self.clock = 0.0
        self.environ = {"TEST_SECRET": provider.secret}
        oauth = task_pb2.PulsarOauth(
            issuer_url=provider.url,
            client_id="alice-client",
            client_secret=secret_pb2.Secret(env="TEST_SECRET"),
        )
        secrets = SecretResolver(env_prefix="TEST_", environ=self.environ)
        super().__init__(oauth, secrets, now=lambda: self.clock)


@pytest.fixture
def provider() -> Iterator[Provider]:
    """Its tokens are numbered, from 1."""
    with openid_provider(lambda _: f"token {len(served.asked)}") as served:
        yield served


def test_a_token_is_fetched_again_shortly_before_it_ends(provider: Provider) -> None:
    tokens = Tokens(provider)
    assert [tokens(), tokens()] == ["token 1"] * 2
    tokens.clock = 560
    assert tokens() == "token 1"
    tokens.clock = 580
    assert [tokens(), tokens()] == ["token 2"] * 2


def test_a_token_that_holds_is_used_while_there_is_no_new_one(provider: Provider) -> None:
    tokens = Tokens(provider)
    tokens()
    provider.broken, tokens.clock = 503, 580
    assert tokens() == "token 1"
    tokens.clock = 599
    with pytest.raises(RetryableError, match="QUEUE_UNREACHABLE"):
        tokens()
    provider.broken = 0
    tokens.clock += STANDS_SECONDS
    assert tokens() != "token 1"


def test_a_refusal_stands_until_time_or_another_secret_comes(provider: Provider) -> None:
    tokens = Tokens(provider)
    tokens.environ["TEST_SECRET"] = "wrong"
    for _ in range(3):
        with pytest.raises(UserError, match="invalid_client"):
            tokens()
    assert len(provider.asked) == 1
    tokens.clock = STANDS_SECONDS
    with pytest.raises(UserError, match="invalid_client"):
        tokens()
    assert len(provider.asked) == 2
    tokens.environ["TEST_SECRET"] = "right"
    assert tokens() == "token 3"


def test_a_token_that_a_broker_refuses_is_replaced_but_not_at_once(provider: Provider) -> None:
    tokens = Tokens(provider)
    assert not renewed(tokens), "nobody was refused"
    tokens()
    assert not renewed(tokens), "it has just come"
    tokens.clock = STANDS_SECONDS
    assert renewed(tokens)
    assert tokens() == "token 2"
    assert not renewed(lambda: "of another kind")
    assert not renewed(None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"expires_in": 60}, "no token"),
        ({"access_token": "a\nb", "expires_in": 60}, "no token"),
        ({"access_token": "a", "expires_in": "soon"}, "'soon' seconds"),
        ({"access_token": "a", "expires_in": float("inf")}, "inf seconds"),
        ({"access_token": "a", "expires_in": float("nan")}, "nan seconds"),
        ({"access_token": "a", "expires_in": 0}, "0 seconds"),
    ],
)
def test_what_is_no_token_is_refused(
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    answer: dict[str, object],
    said: str,
) -> None:
    monkeypatch.setattr(provider, "login", lambda *_: (200, answer))
    with pytest.raises(UserError, match=said) as refused:
        Tokens(provider)()
    assert refused.value.field == "source.pulsar.oauth"


def test_a_provider_that_says_nothing_of_the_end_is_asked_each_minute(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "login", lambda *_: (200, {"access_token": "a"}))
    tokens = Tokens(provider)
    tokens()
    monkeypatch.setattr(provider, "login", lambda *_: (200, {"access_token": "b"}))
    tokens.clock = 40
    assert tokens() == "a"
    tokens.clock = 60
    assert tokens() == "b"
