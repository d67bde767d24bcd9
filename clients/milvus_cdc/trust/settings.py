"""The blocks about trust in both services' files."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

from milvus_cdc.trust.caller import Role

Name = Annotated[str, Field(min_length=1, max_length=256)]
Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
"""With a public key only: whoever knows one that is meant for HMAC could sign."""


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True
    )


class ServerTls(_Part):
    """PEM files. With `client_ca_file` every client needs a certificate of these authorities."""

    certificate_file: Path
    key_file: Path
    client_ca_file: Path | None = None


class MetricsTls(_Part):
    """Of the page for Prometheus. Without a certificate of its own it is that of the service's
    `tls`; with `client_ca_file` whoever reads it needs a certificate of these authorities.
    """

    certificate_file: Path | None = None
    key_file: Path | None = None
    client_ca_file: Path | None = None

    @model_validator(mode="after")
    def _both(self) -> MetricsTls:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("needs both of certificateFile and keyFile, or none")
        return self

    def files(self, tls: ServerTls | None) -> ServerTls:
        """With those of the service's `tls`, which must be there where this has none."""
        own = self.certificate_file, self.key_file
        certificate, key = (tls.certificate_file, tls.key_file) if tls and not own[0] else own
        assert certificate is not None
        assert key is not None
        return ServerTls(
            certificate_file=certificate, key_file=key, client_ca_file=self.client_ca_file
        )


class ClientTls(_Part):
    """PEM files; the system's authorities are trusted without `ca_file`."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    """What the server's certificate must say instead of the host in its address."""

    @model_validator(mode="after")
    def _both(self) -> ClientTls:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("needs both of certificateFile and keyFile, or none")
        return self


class TokenFrom(_Part):
    """A bearer token, by reference."""

    file: Path | None = None
    env: str = ""

    @model_validator(mode="after")
    def _one(self) -> TokenFrom:
        if (self.file is None) == (not self.env):
            raise ValueError("needs exactly one of file and env")
        return self


class Grant(_Part):
    """What somebody may. A replicator may be bound to its `name` in the fleet."""

    name: Name
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    replicator: str = ""

    @model_validator(mode="after")
    def _fit(self) -> Grant:
        if self.replicator and Role.REPLICATOR not in self.roles:
            raise ValueError("replicator binds one with the role replicator")
        return self


class JwtSettings(_Part):
    """Who signs tokens, and which of their claims count."""

    issuer: Name
    audience: Name
    jwks_file: Path | None = None
    jwks_url: str = ""
    jwks_ca_file: Path | None = None
    refresh_seconds: Annotated[float, Field(ge=1, le=86_400)] = 300.0
    """How often `jwks_url` is read; a key that is not known is asked for sooner."""
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("RS256", "ES256")
    leeway_seconds: Annotated[float, Field(ge=0, le=300)] = 30.0
    """By which clocks may differ."""
    principal_claim: Name = "sub"
    roles_claim: Name = "roles"
    replicator_claim: str = ""
    """Names the replicator that the token is for; who lacks it is not bound."""
    subjects: tuple[Grant, ...] = ()
    """Roles of those whose tokens do not say any, as those of Kubernetes' service accounts."""

    @field_validator("jwks_url")
    @classmethod
    def _safe(cls, url: str) -> str:
        if not url:
            return url
        parts = urlsplit(url)
        there = parts.hostname or ""
        if parts.scheme != "https" and not (parts.scheme == "http" and on_loopback(there)):
            raise ValueError("must be an https:// address: whoever changes the keys on their way "
                             "can be anybody")  # fmt: skip
        return url

    @model_validator(mode="after")
    def _one(self) -> JwtSettings:
        if (self.jwks_file is None) == (not self.jwks_url):
            raise ValueError("needs exactly one of jwksFile and jwksUrl")
        if self.jwks_ca_file is not None and not self.jwks_url:
            raise ValueError("jwksCaFile says nothing without jwksUrl")
        return self


class AuthSettings(_Part):
    """Who may call. Any of the three; a token that is shown decides, then the certificate."""

    certificates: tuple[Grant, ...] = ()
    """By common name or alternative name (DNS, URI, e-mail, IP) of the client's certificate."""
    tokens_file: Path | None = None
    jwt: JwtSettings | None = None

    @model_validator(mode="after")
    def _any(self) -> AuthSettings:
        if not (self.certificates or self.tokens_file or self.jwt):
            raise ValueError("needs at least one of certificates, tokensFile and jwt")
        return self


def on_loopback(host: str) -> bool:
    """Nobody else's machine sees what is sent there."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    return address.rpartition(":")[0]


def fault(
    listen: str,
    tls: ServerTls | None,
    auth: AuthSettings | None,
    insecure: bool,
    *,
    needs_callers: bool,
) -> tuple[str, str] | None:
    """What is open to others without having been asked for: the key to blame, and why.
    `needs_callers`: it matters who calls.
    """
    if auth is not None and auth.certificates and (tls is None or tls.client_ca_file is None):
        return "tls.clientCaFile", "is needed for auth.certificates: who signs the certificates"
    if insecure or on_loopback(host_of(listen)):
        return None
    if tls is None:
        return "tls", (
            f"is needed because listen is {listen}, which other machines can reach: set "
            "tls.certificateFile and tls.keyFile; or listen on 127.0.0.1; or say insecure: true"
        )
    if needs_callers and auth is None and tls.client_ca_file is None:
        return "auth", (
            f"is needed because listen is {listen}, which other machines can reach: set auth or "
            "tls.clientCaFile; or listen on 127.0.0.1; or say insecure: true"
        )
    return None


def metrics_fault(
    metrics: str | None, metrics_tls: MetricsTls | None, tls: ServerTls | None, insecure: bool
) -> tuple[str, str] | None:
    """A page for Prometheus that others can read on its way, or whose settings do not fit."""
    if metrics_tls is not None and metrics is None:
        return "metricsTls", "says nothing without metrics, the address that is listened on"
    if metrics_tls is not None and metrics_tls.certificate_file is None and tls is None:
        return "metricsTls.certificateFile", "is needed, with keyFile, because tls is not set"
    if metrics is None or metrics_tls is not None or insecure or on_loopback(host_of(metrics)):
        return None
    return "metricsTls", (
        f"is needed because metrics is {metrics}, which other machines can reach: "
        "`metricsTls: {}` serves them with the certificate of tls; or listen on 127.0.0.1; or say "
        "insecure: true"
    )


def dialing_fault(
    addresses: tuple[str, ...], tls: ClientTls | None, token: TokenFrom | None, insecure: bool
) -> tuple[str, str] | None:
    """A token that others could read on its way."""
    if token is None or tls is not None or insecure:
        return None
    for address in addresses:
        if not on_loopback(host_of(address)):
            return "controllerTls", (
                f"is needed because controllerToken would travel to {address} for all to read; or "
                "say insecure: true"
            )
    return None
