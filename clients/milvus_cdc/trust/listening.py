"""A server's port."""

from __future__ import annotations

import grpc

from milvus_cdc.errors import UserError
from milvus_cdc.trust.certificates import server_credentials
from milvus_cdc.trust.settings import ServerTls


def add_port(server: grpc.aio.Server, listen: str, tls: ServerTls | None) -> int:
    """The port's number. Raises UserError ADDRESS_UNUSABLE, and for files that cannot be used."""
    credentials = server_credentials(tls) if tls is not None else None
    try:
        if credentials is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise UserError("ADDRESS_UNUSABLE", f"listen: {listen}: {error}", field="listen") from error
