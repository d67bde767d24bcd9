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


def test_others_must_be_able_to_reach_it(tmp_path: Path) -> None:
    for address in ("0.0.0.0:7070", "[::]:7070"):
        assert load(tmp_path, listen=address).listen == address
        with pytest.raises(UserError) as refused:
            load(tmp_path, **ETCD, listen=address)
        assert (refused.value.reason, refused.value.field) == ("CONFIG_INVALID", "advertise")
        named = load(tmp_path, **ETCD, listen=address, advertise="cdc-1:7070")
        assert named.advertised == "cdc-1:7070"
