"""Which store a URI means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from milvuscdc.v1 import dead_letters_pb2, sink_file_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver, resolve
from milvus_cdc.sink.files.store import LocalStore, Store


def open_store_of(
    spec: sink_file_pb2.FileSink | dead_letters_pb2.DeadLetterFiles,
    secrets: SecretResolver,
    field: str,
) -> Store:
    """What a task says, `field` being its place there; no I/O yet. Raises UserError for a secret or
    a URI that cannot be used.
    """
    s3, place = spec.s3, f"{field}.s3"
    return open_store(
        spec.uri,
        endpoint=s3.endpoint,
        region=s3.region,
        access_key_id=resolve(secrets, s3.access_key_id, f"{place}.access_key_id"),
        secret_access_key=resolve(secrets, s3.secret_access_key, f"{place}.secret_access_key"),
        session_token=resolve(secrets, s3.session_token, f"{place}.session_token"),
        field=field,
    )


def open_store(
    uri: str,
    *,
    endpoint: str = "",
    region: str = "",
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
    field: str = "sink.files",
) -> Store:
    """`file:///folder` or `s3://bucket/prefix`; no I/O yet. Raises UserError URI_INVALID."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and not (parts.query or parts.fragment):
        from milvus_cdc.sink.files.object_store import ObjectStore

        if bool(access_key_id) != bool(secret_access_key):
            raise UserError(
                "KEY_INCOMPLETE",
                "an access key and its secret come together, or neither of them",
                field=f"{field}.s3",
            )
        return ObjectStore(
            parts.netloc,
            parts.path.strip("/"),
            endpoint=endpoint,
            region=region,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            session_token=session_token,
        )
    raise UserError(
        "URI_INVALID",
        f"{uri!r} is neither file:///folder nor s3://bucket/prefix",
        field=f"{field}.uri",
    )
