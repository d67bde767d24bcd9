"""TLS towards Pulsar's brokers, their REST API and whoever gives tokens for them."""

from __future__ import annotations

import ssl

from milvus_cdc.errors import UserError
from milvus_cdc.source import PulsarConfig
from milvus_cdc.tls import Fields, TlsFiles

FIELD = "source.pulsar.tls"


def tls_context(config: PulsarConfig) -> ssl.SSLContext:
    """Raises UserError TLS_FILE_UNUSABLE for files that cannot be used, INVALID_FIELD for what
    Pulsar's client does not know.
    """
    if config.tls is None:
        return plain_context(TlsFiles(fields=Fields(FIELD)))
    if config.tls.server_name:
        field = f"{FIELD}.server_name"
        raise UserError(
            "INVALID_FIELD",
            f"{field}: Pulsar's client knows none; give service_url a host that the certificate "
            "names",
            field=field,
        )
    return plain_context(TlsFiles.of(config.tls, Fields(FIELD)))


def plain_context(files: TlsFiles) -> ssl.SSLContext:
    """For what is not HTTP/2. Raises UserError TLS_FILE_UNUSABLE."""
    context = files.context()
    context.set_alpn_protocols([])
    return context


def tls_trouble(error: BaseException | None) -> bool:
    """Whether certificates are to blame, here or at the other side."""
    while error is not None:
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return True
        error = error.__cause__ or error.__context__
    return False
