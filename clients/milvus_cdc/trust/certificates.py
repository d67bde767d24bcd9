"""Certificates and keys as PEM: whether they can be used, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from milvus_cdc.errors import UserError
from milvus_cdc.trust.settings import ServerTls
from milvus_cdc.trust.watched import Watched

log = structlog.get_logger(__name__)

SOON = timedelta(days=7)
"""Before its end a certificate is warned of when it is read."""


def authorities(pem: bytes, field: str) -> bytes:
    """Raises UserError CERTIFICATE_INVALID when there is none in it."""
    _certificates(pem, field)
    return pem


def pair(certificate: bytes, key: bytes, fields: tuple[str, str]) -> tuple[bytes, bytes]:
    """A chain and the key of its first certificate. Raises UserError CERTIFICATE_INVALID."""
    first = _certificates(certificate, fields[0])[0]
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        # The message of the library may quote what it could not read.
        raise _invalid(fields[1], "is no PEM private key without a password") from error
    if private.public_key() != first.public_key():
        raise _invalid(fields[1], f"is not the key of the certificate in {fields[0]}")
    ends = first.not_valid_after_utc
    if ends < datetime.now(UTC) + SOON:
        log.warning("a certificate ends soon or has ended", setting=fields[0], ends=str(ends))
    return certificate, key


@lru_cache(maxsize=1024)
def end_of(pem: bytes) -> float:
    """Unix time after which a peer's certificate is not valid."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Files that change are used from the next handshake on; connections that stand go on.

    Raises UserError FILE_UNREADABLE, CERTIFICATE_INVALID.
    """
    files: list[tuple[str, Path]] = [
        ("tls.certificateFile", tls.certificate_file),
        ("tls.keyFile", tls.key_file),
    ]
    if tls.client_ca_file is not None:
        files.append(("tls.clientCaFile", tls.client_ca_file))

    def parse(contents: Sequence[bytes]) -> Any:
        chain, key = pair(contents[0], contents[1], ("tls.certificateFile", "tls.keyFile"))
        trusted = authorities(contents[2], "tls.clientCaFile") if len(contents) > 2 else None
        return grpc.ssl_server_certificate_configuration([(key, chain)], trusted)

    watched = Watched(files, parse)
    begun = watched.get()
    told = begun

    def newest() -> Any:
        nonlocal told
        now = watched.get()
        if now is told:
            return None
        told = now
        return now

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        begun, newest, require_client_authentication=tls.client_ca_file is not None
    )
    return credentials


def _certificates(pem: bytes, field: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise _invalid(field, "holds no PEM certificate") from error


def _invalid(field: str, why: str) -> UserError:
    return UserError("CERTIFICATE_INVALID", f"{field}: {why}", field=field)
