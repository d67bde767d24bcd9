"""What a task may say of a source on Pulsar, and what a replicator makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format
from milvus_cdc.source import PulsarConfig
from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.validation import check
from milvus_cdc_replicator.spec import queue_config
from milvuscdc.v1 import task_pb2, tls_pb2

PLAIN = {"serviceUrl": "pulsar://a:6650,b:6650"}
SECURE = {"serviceUrl": "pulsar+ssl://a:6651"}
OAUTH = {
    "issuerUrl": "https://provider/realm",
    "clientId": "c",
    "clientSecret": {"env": "MILVUS_CDC_SECRET_P"},
}


def source(pulsar: dict[str, Any]) -> task_pb2.Source:
    text = {"etcd": {"endpoints": ["etcd:2379"]}, "pulsar": pulsar}
    return json_format.ParseDict(text, task_pb2.Source())


def test_what_is_left_out_is_as_milvus_has_it() -> None:
    check(source(PLAIN))
    assert queue_config(source(PLAIN)) == PulsarConfig("pulsar://a:6650,b:6650", held=True)
    whole = SECURE | {
        "adminUrl": "https://a:8443",
        "tenant": "t",
        "namespace": "n-1",
        "tls": {"caFile": "/ca", "certificateFile": "/c", "keyFile": "/k"},
        "token": {"env": "MILVUS_CDC_SECRET_P"},
        "hold": "PULSAR_HOLD_NONE",
    }
    check(source(whole))
    config = queue_config(source(whole))
    assert isinstance(config, PulsarConfig)
    assert (config.tenant, config.namespace, config.held) == ("t", "n-1", False)
    assert config.tls == tls_pb2.Tls(ca_file="/ca", certificate_file="/c", key_file="/k")
    other = queue_config(source(whole | {"token": {"env": "MILVUS_CDC_SECRET_Q"}}))
    assert config != other, "another token is another connection"
    assert config == queue_config(source(whole))
    by_provider = source(PLAIN | {"oauth": OAUTH})
    check(by_provider)
    one = queue_config(by_provider)
    assert one == queue_config(source(PLAIN | {"oauth": OAUTH}))
    assert one != queue_config(source(PLAIN | {"oauth": OAUTH | {"scope": "s"}}))


@pytest.mark.parametrize(
    ("pulsar", "said"),
    [
        ({"serviceUrl": "a:6650"}, "service_url"),
        ({"serviceUrl": "http://a:8080"}, "service_url"),
        ({"serviceUrl": "pulsar://user:password@a:6650"}, "service_url"),
        (PLAIN | {"adminUrl": "a:8080"}, "admin_url"),
        (PLAIN | {"namespace": "public/default"}, "namespace"),
        (PLAIN | {"hold": 9}, "hold"),
        (PLAIN | {"tls": {"caFile": "/ca"}}, "no use without"),
        (PLAIN | {"token": {"env": "MILVUS_CDC_SECRET_P"}, "oauth": OAUTH}, "each is a login"),
        (PLAIN | {"oauth": OAUTH | {"issuerUrl": "provider"}}, "issuer_url"),
        (PLAIN | {"oauth": OAUTH | {"clientId": ""}}, "client_id"),
        (PLAIN | {"oauth": {"issuerUrl": "https://p", "clientId": "c"}}, "client_secret"),
        (SECURE | {"tls": {"serverName": "b"}}, "tls.serverName"),
        (SECURE | {"tls": {"certificateFile": "/c"}}, "go together"),
    ],
)
def test_what_cannot_be_is_refused_by_name(pulsar: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError) as refused:
        check(source(pulsar))
    assert refused.value.reason == "INVALID_FIELD"
    assert "pulsar" in refused.value.message
    assert said in refused.value.message
