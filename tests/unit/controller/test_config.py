"""The controller's file: what does not fit together is refused, with the key to blame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from milvus_cdc.errors import UserError
from milvus_cdc_controller import config
from milvus_cdc_replicator import settings

ROOT = Path(__file__).parents[3]
ETCD: dict[str, Any] = {"store": {"etcd": {"endpoints": ["etcd:2379"]}}}


def load(folder: Path, **body: Any) -> config.Config:
    path = folder / "controller.yaml"
    path.write_text(yaml.safe_dump(body))
    return config.load(path)


def test_the_examples_are_what_they_say() -> None:
    plain = config.load(ROOT / "examples/controller.yaml")
    assert plain == config.Config()
    assert settings.load(ROOT / "examples/replicator.yaml").controller == (plain.listen,)
    folder = ROOT / "deploy/examples/controllers"
    several = [config.load(folder / f"controller-{letter}.yaml") for letter in "ab"]
    replicator = settings.load(folder / "replicator.yaml")
    assert replicator.controller == tuple(one.advertised for one in several)
    assert several[0].store == several[1].store
    assert len({(one.listen, one.metrics) for one in several}) == 2


def test_leases_of_replicators_outlast_an_election(tmp_path: Path) -> None:
    assert load(tmp_path, **ETCD).silence_seconds == 5 + 3 + 2
    etcd = {"store": {"etcd": {**ETCD["store"]["etcd"], "leaseSeconds": 10}}}
    with pytest.raises(UserError) as refused:
        load(tmp_path, **etcd)
    assert (refused.value.reason, refused.value.field) == ("CONFIG_INVALID", "lease.ttl")
    assert "at least 19 " in refused.value.message
    assert load(tmp_path, **etcd, lease={"ttl": 19}).lease.ttl == 19
    alone = load(tmp_path, lease={"ttl": 6, "heartbeat": 1})
    assert alone.silence_seconds == 0, "there is no election on SQLite"


@pytest.mark.parametrize(
    ("etcd", "why"),
    [
        ({"username": "cdc"}, "username and password go together"),
        ({"password": {"env": "PW"}}, "username and password go together"),
        ({"username": "cdc", "password": "literal"}, "store.etcd.password"),
        ({"username": "cdc", "password": {}}, "exactly one of env and file"),
        ({"tls": {"certificateFile": "c.pem"}}, "certificateFile and keyFile go together"),
        ({"tls": {"ca": "c.pem"}}, "store.etcd.tls.ca: unknown key"),
    ],
)
def test_trust_that_cannot_be_meant_so(tmp_path: Path, etcd: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, store={"etcd": {"endpoints": ["etcd:2379"], **etcd}})
    assert refused.value.field.startswith("store.etcd")
    assert why in refused.value.message


def test_a_password_is_read_where_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pw").write_text("first\n")
    monkeypatch.setenv("ETCD_PW", "of env")
    for password, found in (
        ({"file": str(tmp_path / "pw")}, "first"),
        ({"env": "ETCD_PW"}, "of env"),
    ):
        etcd = {"endpoints": ["etcd:2379"], "username": "cdc", "password": password}
        loaded = load(tmp_path, store={"etcd": etcd}).store.etcd
        assert loaded is not None
        assert loaded.security.password() == found


def test_others_must_be_able_to_reach_it(tmp_path: Path) -> None:
    for address in ("0.0.0.0:7070", "[::]:7070"):
        assert load(tmp_path, listen=address, insecure=True).listen == address
        with pytest.raises(UserError) as refused:
            load(tmp_path, **ETCD, listen=address, insecure=True)
        assert (refused.value.reason, refused.value.field) == ("CONFIG_INVALID", "advertise")
        named = load(tmp_path, **ETCD, listen=address, advertise="cdc-1:7070", insecure=True)
        assert named.advertised == "cdc-1:7070"


TLS = {"certificateFile": "server.crt", "keyFile": "server.key"}
MUTUAL = {**TLS, "clientCaFile": "ca.pem"}
TOKENS = {"tokensFile": "tokens.yaml"}
ISSUER = {"issuer": "https://issuer.test", "audience": "milvus-cdc"}
SHOWN = {"caFile": "ca.pem", "certificateFile": "client.crt", "keyFile": "client.key"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"listen": "0.0.0.0:7070"}, "tls"),
        ({"listen": "[::]:7070"}, "tls"),
        ({"listen": "cdc.internal:7070"}, "tls"),
        ({"listen": "0.0.0.0:7070", "auth": TOKENS}, "tls"),
        ({"listen": "0.0.0.0:7070", "tls": TLS}, "auth"),
        ({"auth": {"certificates": [{"name": "a", "roles": ["admin"]}]}}, "tls.clientCaFile"),
        ({"tls": {"certificateFile": "server.crt"}}, "tls.keyFile"),
        ({"auth": {}}, "auth"),
        ({"auth": {"certificates": [{"name": "a", "roles": ["king"]}]}},
         "auth.certificates.0.roles.0"),
        ({**ETCD, "tls": TLS}, "controllerTls"),
        ({**ETCD, "tls": MUTUAL, "controllerTls": {"caFile": "ca.pem"}},
         "controllerTls.certificateFile"),
        ({**ETCD, "auth": TOKENS}, "controllerToken"),
        ({"controllerTls": {"keyFile": "client.key"}}, "controllerTls"),
        ({"controllerToken": {}}, "controllerToken"),
        ({"controllerTls": {}}, "controllerTls"),
        ({"controllerToken": {"file": "token"}}, "controllerToken"),
        ({"auth": {"jwt": {**ISSUER, "jwksFile": "k", "algorithms": ["HS256"]}}},
         "auth.jwt.algorithms.0"),
        ({"auth": {"jwt": {**ISSUER, "jwksUrl": "http://example.com/keys"}}}, "auth.jwt.jwksUrl"),
    ],
)  # fmt: skip
def test_what_is_open_or_does_not_fit_is_refused(
    tmp_path: Path, body: dict[str, Any], field: str
) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, **body)
    assert (refused.value.reason, refused.value.field) == ("CONFIG_INVALID", field)


def test_what_others_can_reach_is_trusted_or_meant(tmp_path: Path) -> None:
    beyond = {"listen": "0.0.0.0:7070"}
    assert load(tmp_path, **beyond, tls=TLS, auth=TOKENS).tls is not None
    assert load(tmp_path, **beyond, tls=MUTUAL).auth is None
    assert load(tmp_path, **beyond, insecure=True).insecure
    several = {**ETCD, **beyond, "advertise": "cdc-1:7070", "auth": TOKENS, "tls": MUTUAL}
    assert load(tmp_path, **several, controllerTls=SHOWN).controller_tls is not None
    for address in ("127.0.0.1:7070", "[::1]:7070", "localhost:7070"):
        assert load(tmp_path, listen=address).listen == address


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"listen": "0.0.0.0:7080"}, "tls"),
        ({"controller": "cdc:7070", "controllerToken": {"file": "token"}}, "controllerTls"),
        ({"controllerToken": {"file": "token", "env": "TOKEN"}}, "controllerToken"),
    ],
)
def test_a_replicator_is_as_careful(tmp_path: Path, body: dict[str, Any], field: str) -> None:
    path = tmp_path / "replicator.yaml"
    path.write_text(yaml.safe_dump(body))
    with pytest.raises(UserError) as refused:
        settings.load(path)
    assert (refused.value.reason, refused.value.field) == ("CONFIG_INVALID", field)
    path.write_text(yaml.safe_dump({**body, "controllerToken": None, "insecure": True}))
    assert settings.load(path).insecure


@pytest.mark.parametrize("service", ["controller", "replicator"])
def test_metrics_beyond_loopback_need_tls_or_a_word(tmp_path: Path, service: str) -> None:
    def read(**body: Any) -> config.Config | settings.Settings:
        path = tmp_path / "service.yaml"
        path.write_text(yaml.safe_dump(body))
        return config.load(path) if service == "controller" else settings.load(path)

    pair = {"certificateFile": "a.crt", "keyFile": "a.key"}
    own = {"certificateFile": "b.crt", "keyFile": "b.key", "clientCaFile": "ca.pem"}
    for body, field in (
        ({"metrics": "0.0.0.0:7079"}, "metricsTls"),
        ({"metrics": "cdc.internal:7079", "tls": pair}, "metricsTls"),
        ({"metricsTls": {}}, "metricsTls.certificateFile"),
        ({"metricsTls": {"keyFile": "a.key"}}, "metricsTls"),
        ({"metricsTls": {"caFile": "ca.pem"}}, "metricsTls.caFile"),
    ):
        with pytest.raises(UserError) as refused:
            read(**body)
        assert (refused.value.reason, refused.value.field) == ("CONFIG_INVALID", field)
    assert read(metrics="0.0.0.0:7079", insecure=True).scraped_with is None
    assert read(tls=pair).scraped_with is None, "on loopback it stays as it was"
    shared = read(metrics="0.0.0.0:7079", tls=pair, metricsTls={}).scraped_with
    assert shared is not None
    assert (shared.certificate_file, shared.client_ca_file) == (Path("a.crt"), None)
    separate = read(metrics="0.0.0.0:7079", tls=pair, metricsTls=own).scraped_with
    assert separate is not None
    assert (separate.certificate_file, separate.client_ca_file) == (Path("b.crt"), Path("ca.pem"))


def test_metrics_that_are_off_need_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load(tmp_path, metrics=None, metricsTls={"certificateFile": "a", "keyFile": "b"})
    assert refused.value.field == "metricsTls"
