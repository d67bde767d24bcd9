"""A task's `MilvusEndpoint` as a client."""

from __future__ import annotations

from milvuscdc.v1 import task_pb2

from milvus_cdc.milvus_client import MilvusClient
from milvus_cdc.secrets import SecretResolver, resolve
from milvus_cdc.tls import Fields, TlsFiles


def open_endpoint(
    spec: task_pb2.MilvusEndpoint, secrets: SecretResolver, *, who: str
) -> MilvusClient:
    """No I/O yet; `who` is `sink` or `source`. Raises UserError for a secret that cannot be
    resolved.
    """
    field = f"{who}.milvus"
    token = resolve(secrets, spec.token, f"{field}.token")
    tls = TlsFiles.of(spec.tls, Fields(f"{field}.tls")) if spec.HasField("tls") else None
    return MilvusClient(spec.uri, token, who=who, tls=tls)
