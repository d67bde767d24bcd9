"""Which store a URI means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from milvus_cdc.errors import UserError
from milvus_cdc.sink.files.store import URI_FIELD, LocalStore, Store


def open_store(
    uri: str,
    *,
    endpoint: str = "",
    region: str = "",
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    session_token: str | None = None,
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
                field="sink.files.s3",
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
        "URI_INVALID", f"{uri!r} is neither file:///folder nor s3://bucket/prefix", field=URI_FIELD
    )
