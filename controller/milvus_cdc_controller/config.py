"""The controller's configuration file (YAML). Unknown keys are errors; errors name their key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from milvus_cdc import plain_yaml
from milvus_cdc.errors import UserError
from milvus_cdc.etcd import EtcdSecurity
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.tls import Fields, TlsFiles
from milvus_cdc.trust import settings as trust
from milvus_cdc.trust.quotas import Quotas
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from milvus_cdc_controller.core.liveness import Leases
from milvus_cdc_controller.core.moving import Policy

FAILOVER_SECONDS = 3.0
"""For etcd to notice the end of a leader's lease, an election, and loading what is stored."""
RECONNECT_SECONDS = 2.0
"""For a replicator to be connected to the new leader."""
LEAST_WRITE_SECONDS = 1.0
"""A replicator begins no write with less of its lease left."""

Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s/]+):[0-9]{1,5}$")]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True
    )


class TlsConfig(_Part):
    """Files in PEM, read when a connection is made, and again once they have changed."""

    ca_file: str = ""
    """Authorities to trust; the system's when empty."""
    certificate_file: str = ""
    key_file: str = ""
    server_name: str = ""
    """That the server's certificate must have; that of its address when empty."""

    @model_validator(mode="after")
    def _both(self) -> TlsConfig:
        if bool(self.certificate_file) != bool(self.key_file):
            raise ValueError("certificateFile and keyFile go together")
        return self

    def files(self, fields: Fields) -> TlsFiles:
        return TlsFiles(
            self.ca_file, self.certificate_file, self.key_file, self.server_name, fields
        )


class SecretConfig(_Part):
    """Where a secret is: exactly one of them. White space around it is not part of it."""

    env: str = ""
    file: str = ""

    @model_validator(mode="after")
    def _one(self) -> SecretConfig:
        if bool(self.env) == bool(self.file):
            raise ValueError("needs exactly one of env and file")
        return self

    def read(self, field: str) -> str:
        """Raises UserError SECRET_MISSING. Whoever writes this file may name any place."""
        try:
            value = Path(self.file).read_text() if self.file else os.environ.get(self.env, "")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "SECRET_MISSING", f"{field}: the file {self.file} cannot be read", field=field
            ) from error
        if not value.strip():
            where = f"the file {self.file}" if self.file else f"the variable {self.env}"
            raise UserError("SECRET_MISSING", f"{field}: {where} is empty", field=field)
        return value.strip()


class SecretsConfig(_Part):
    """Which secrets a task may name here (`source.etcd.password`): anything else could send any
    variable or file of the controller to any address.
    """

    env_prefix: Annotated[str, Field(min_length=1)] = "MILVUS_CDC_SECRET_"
    folders: tuple[str, ...] = ()

    @property
    def resolver(self) -> SecretResolver:
        return SecretResolver(env_prefix=self.env_prefix, folders=self.folders, who="controller")


class SqliteConfig(_Part):
    """One file, one controller."""

    path: Path


class EtcdConfig(_Part):
    """The controller's own keys, below `prefix`; not the source's etcd."""

    endpoints: list[Annotated[str, Field(pattern=r"^[^/\s]+:[0-9]{1,5}$")]] = Field(min_length=1)
    prefix: str = "milvus-cdc"
    lease_seconds: Annotated[int, Field(ge=2, le=300)] = 5
    """The leader's. Another one leads at most FAILOVER_SECONDS after its end."""
    tls: TlsConfig | None = None
    """Without it connections are plaintext."""
    username: str = ""
    password: SecretConfig | None = None

    @model_validator(mode="after")
    def _login(self) -> EtcdConfig:
        if bool(self.username) != (self.password is not None):
            raise ValueError("username and password go together")
        return self

    @property
    def security(self) -> EtcdSecurity:
        tls = self.tls
        return EtcdSecurity(
            tls=None if tls is None else tls.files(Fields("store.etcd.tls", to_camel)),
            username=self.username,
            password=self._password,
            fields=Fields("store.etcd", to_camel),
        )

    def _password(self) -> str:
        return "" if self.password is None else self.password.read("store.etcd.password")


class StoreConfig(_Part):
    """Exactly one of them."""

    sqlite: SqliteConfig | None = None
    etcd: EtcdConfig | None = None

    @model_validator(mode="after")
    def _one(self) -> StoreConfig:
        if (self.sqlite is None) == (self.etcd is None):
            raise ValueError("needs exactly one of sqlite and etcd")
        return self


class LeaseConfig(_Part):
    """What replicators are told. All in seconds."""

    ttl: Annotated[float, Field(ge=1, le=600)] = 15.0
    heartbeat: Annotated[float, Field(ge=0.1, le=200)] = 3.0
    clock_margin: Annotated[float, Field(ge=0.1, le=60)] = 2.0
    progress: Annotated[float, Field(ge=0.05, le=60)] = 1.0

    @model_validator(mode="after")
    def _fit(self) -> LeaseConfig:
        if self.heartbeat * 3 > self.ttl:
            raise ValueError(
                "heartbeat must be at most a third of ttl: one lost beat is no failure"
            )
        return self

    @property
    def leases(self) -> Leases:
        return Leases(
            ttl_ms=round(self.ttl * 1000),
            heartbeat_ms=round(self.heartbeat * 1000),
            margin_ms=round(self.clock_margin * 1000),
        )


class RetentionConfig(_Part):
    """When a checkpoint counts as near the edge of what the queue keeps."""

    warn_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of the queue's limit in time or bytes: with less left the collection says RETENTION_LOW."""
    check_seconds: Annotated[float, Field(ge=0.5, le=3600)] = 60.0
    """How often the places of collections that nobody reads (paused, failed) are looked at."""


class PlacementConfig(_Part):
    """How eagerly work is moved between replicators."""

    moves_at_once: Annotated[int, Field(ge=1, le=1000)] = 4
    """Hand-offs under way at a time: drains, moves and evening out together."""
    rebalance: bool = True
    """Even out by itself after replicators came or went."""
    moves_per_minute: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Most moves of evening out by itself."""
    hysteresis: Annotated[float, Field(ge=0, le=10)] = 0.25
    """Loads that differ by less than this part of the average count as even."""
    settle_seconds: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """No replicator may have come or gone for so long before it evens out by itself."""

    @property
    def policy(self) -> Policy:
        return Policy(
            moves_at_once=self.moves_at_once,
            rebalance=self.rebalance,
            moves_per_minute=self.moves_per_minute,
            hysteresis=self.hysteresis,
            settle_ms=round(self.settle_seconds * 1000),
        )


class KeyConfig(_Part):
    """A key that secrets are encrypted with: base64 of 32 bytes, in exactly one of the two."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,63}$")]
    file: Path | None = None
    env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")] | None = None

    @model_validator(mode="after")
    def _one(self) -> KeyConfig:
        if (self.file is None) == (self.env is None):
            raise ValueError("needs exactly one of file and env")
        return self


class LimitConfig(_Part):
    """What one controller takes on. More of it is refused, and what is there works on."""

    tasks: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    streams: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Of replicators."""
    watches: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Of tasks."""
    tasks_per_principal: Annotated[int, Field(ge=1, le=1_000_000)] = 5_000
    """Made by one; as are the next ones, where callers are asked who they are."""
    streams_per_principal: Annotated[int, Field(ge=1, le=100_000)] = 500
    """Of replicators, watches, comparisons and reflection together."""
    calls_per_principal: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Under way at a time."""

    @property
    def quotas(self) -> Quotas:
        return Quotas(self.calls_per_principal, self.streams_per_principal)


class LogConfig(_Part):
    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(_Part):
    listen: Address = "127.0.0.1:7070"
    advertise: Address | None = None
    """Where other controllers reach this one."""
    metrics: Address | None = "127.0.0.1:7071"
    store: StoreConfig = StoreConfig(sqlite=SqliteConfig(path=Path("milvus-cdc.db")))
    lease: LeaseConfig = LeaseConfig()
    retention: RetentionConfig = RetentionConfig()
    placement: PlacementConfig = PlacementConfig()
    cluster: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")] = ""
    """Replicators that name another one are refused."""
    secrets: SecretsConfig = SecretsConfig()
    limits: LimitConfig = LimitConfig()
    secrets_keys: Annotated[tuple[KeyConfig, ...], Field(max_length=100)] = ()
    """Without one, secrets in requests are references only. The first encrypts, all decrypt."""
    log: LogConfig = LogConfig()
    tls: trust.ServerTls | None = None
    """Of what listens."""
    metrics_tls: trust.MetricsTls | None = None
    """Of the metrics; without it they are served in plaintext."""
    auth: trust.AuthSettings | None = None
    """Who may call; without it everybody who can connect."""
    insecure: bool = False
    """What is open to everybody, or readable on its way, beyond loopback is meant to be so."""
    controller_tls: trust.ClientTls | None = None
    """Towards the controller that leads, as is the next one."""
    controller_token: trust.TokenFrom | None = None

    @property
    def advertised(self) -> str:
        return self.advertise or self.listen

    @property
    def scraped_with(self) -> trust.ServerTls | None:
        """The files that the metrics are served with."""
        return self.metrics_tls.files(self.tls) if self.metrics_tls is not None else None

    @property
    def silence_seconds(self) -> float:
        """How long nobody may lead after a leader has died, as replicators see it."""
        if self.store.etcd is None:
            return 0
        return self.store.etcd.lease_seconds + FAILOVER_SECONDS + RECONNECT_SECONDS

    def fault(self) -> tuple[str, str] | None:
        """What does not fit together: the key to blame, and why."""
        return self._fault_of_keys() or self._fault_of_leases() or self._fault_of_trust()

    def _fault_of_keys(self) -> tuple[str, str] | None:
        ids = [key.id for key in self.secrets_keys]
        if len(set(ids)) < len(ids):
            return "secretsKeys", "two keys have the same id; the id says which one to decrypt with"
        return None

    def _fault_of_trust(self) -> tuple[str, str] | None:
        fault = (
            trust.fault(self.listen, self.tls, self.auth, self.insecure, needs_callers=True)
            or trust.metrics_fault(self.metrics, self.metrics_tls, self.tls, self.insecure)
            or trust.dialing_fault(
                (self.advertised,), self.controller_tls, self.controller_token, self.insecure
            )
        )
        if fault is not None:
            return fault
        if self.store.etcd is None:
            if self.controller_tls is None and self.controller_token is None:
                return None
            key = "controllerToken" if self.controller_tls is None else "controllerTls"
            return key, "says nothing without store.etcd: there is no other controller to call"
        if self.tls is not None and self.controller_tls is None:
            return "controllerTls", (
                "is needed because tls is set: the other controllers listen like this one, and "
                "calls are passed on to the one that leads"
            )
        shown = self.controller_tls is not None and self.controller_tls.certificate_file is not None
        if self.tls is not None and self.tls.client_ca_file is not None and not shown:
            return "controllerTls.certificateFile", (
                "is needed because tls.clientCaFile is set: the other controllers ask for it, too"
            )
        if self.auth is not None and self.controller_token is None and not shown:
            return "controllerToken", (
                "(or controllerTls.certificateFile) is needed because auth is set: this controller "
                "has to say who it is when it passes calls on"
            )
        return None

    def _fault_of_leases(self) -> tuple[str, str] | None:
        if self.store.etcd is None:
            return None
        least = self.lease.heartbeat + self.silence_seconds + LEAST_WRITE_SECONDS
        if self.lease.ttl < least:
            return "lease.ttl", (
                f"must be at least {least:g} (lease.heartbeat + store.etcd.leaseSeconds + "
                f"{FAILOVER_SECONDS + RECONNECT_SECONDS + LEAST_WRITE_SECONDS:g}), so that "
                "replicators go on writing while another controller is elected; raise it, or lower "
                "store.etcd.leaseSeconds"
            )
        host = self.advertised.rpartition(":")[0]
        if host in ("0.0.0.0", "[::]", "[::0]"):
            return "advertise", (
                f"{self.advertised} is no address that other controllers can reach this one at; "
                "name one"
            )
        return None


def load(path: Path) -> Config:
    """Raises UserError CONFIG_UNREADABLE, CONFIG_INVALID with the key at fault."""
    try:
        body = plain_yaml.load_file(path)
    except OSError as error:
        raise UserError("CONFIG_UNREADABLE", f"{path}: {error.strerror}") from error
    except plain_yaml.BadYamlError as error:
        raise UserError("CONFIG_UNREADABLE", f"{path} is not YAML: {_place(error)}") from error
    try:
        config = Config.model_validate({} if body is None else body)
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc']) or 'the file'}: {_say(fault['msg'])}"
            for fault in error.errors()
        ]
        raise UserError(
            "CONFIG_INVALID",
            f"{path}: {'; '.join(faults)}",
            field=".".join(str(part) for part in error.errors()[0]["loc"]),
        ) from error
    fault = config.fault()
    if fault is not None:
        key, why = fault
        raise UserError("CONFIG_INVALID", f"{path}: {key}: {why}", field=key)
    return config


def _place(error: plain_yaml.BadYamlError) -> str:
    return f"line {error.line}: {error}" if error.line else str(error)


def _say(message: str) -> str:
    return {
        "Extra inputs are not permitted": "unknown key",
    }.get(message, message)
