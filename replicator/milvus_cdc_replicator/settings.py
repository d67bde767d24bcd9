"""The replicator's configuration: one YAML file, every key checked, nothing unknown accepted."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from milvus_cdc import plain_yaml
from milvus_cdc.errors import UserError
from milvus_cdc.trust import settings as trust
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from milvus_cdc_replicator.core.sequencer import WriteLimits

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that runners keep."""

    writes: WriteLimits = field(default_factory=WriteLimits)
    assignment_bytes: int = 48 * MIB
    reconcile_seconds: float = 300
    """Between two comparisons of a collection with its sink, rows aside."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True
    )


class LogSettings(_Strict):
    """`format` console is for people, json for machines."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


class WriteSettings(_Strict):
    """Shape and number of requests to a sink."""

    rows_per_request: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    bytes_per_request: Annotated[int, Field(ge=65_536, le=48 * MIB)] = 8 * MIB
    in_flight_per_collection: Annotated[int, Field(ge=1, le=64)] = 4
    in_flight_per_sink: Annotated[int, Field(ge=1, le=256)] = 8


class SecretSettings(_Strict):
    """Which secrets a task may name: anything else could send any variable or file to any
    address.
    """

    env_prefix: Annotated[str, Field(min_length=1)] = "MILVUS_CDC_SECRET_"
    folders: tuple[str, ...] = ()


def _several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Settings(_Strict):
    """`controller` is the only key most installations set."""

    controller: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)] = (
        "127.0.0.1:7070",
    )
    """Any of the controllers of one installation, or several: tried in this order."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$")] = (
        Field(default_factory=socket.gethostname)
    )
    listen: str = "127.0.0.1:7080"
    """gRPC health and reflection."""
    metrics: str = "127.0.0.1:7081"
    capacity: Annotated[int, Field(ge=0)] = 0
    cluster: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")] = ""
    """The controller's `cluster`: another one refuses."""
    labels: dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")],
        Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")],
    ] = Field(default_factory=dict, max_length=64)
    """What tasks may ask for with `replicator_labels`."""
    memory_mib: Annotated[int, Field(ge=8, le=65_536, alias="memoryMiB")] = 64
    """Rows in transit; the process itself needs about 100 MiB more."""
    shutdown_seconds: Annotated[float, Field(gt=0, le=600)] = 20
    """From SIGTERM to the end at the latest; seven tenths of it for handing over in turn."""
    reconcile_seconds: Annotated[float, Field(ge=1, le=86_400)] = 300
    """Between two comparisons of a collection with its sink, rows aside; varied by a fifth."""
    writes: WriteSettings = WriteSettings()
    secrets: SecretSettings = SecretSettings()
    log: LogSettings = LogSettings()
    tls: trust.ServerTls | None = None
    """Of what listens."""
    metrics_tls: trust.MetricsTls | None = None
    """Of the metrics; without it they are served in plaintext."""
    auth: trust.AuthSettings | None = None
    """Who may ask for reflection; health is open."""
    insecure: bool = False
    """What is readable on its way beyond loopback is meant to be so."""
    controller_tls: trust.ClientTls | None = None
    """Towards the controllers, as is the next one."""
    controller_token: trust.TokenFrom | None = None

    def fault(self) -> tuple[str, str] | None:
        """What does not fit together: the key to blame, and why."""
        return (
            trust.fault(self.listen, self.tls, self.auth, self.insecure, needs_callers=False)
            or trust.metrics_fault(self.metrics, self.metrics_tls, self.tls, self.insecure)
            or trust.dialing_fault(
                self.controller, self.controller_tls, self.controller_token, self.insecure
            )
        )

    @property
    def scraped_with(self) -> trust.ServerTls | None:
        """The files that the metrics are served with."""
        return self.metrics_tls.files(self.tls) if self.metrics_tls is not None else None

    def limits(self) -> Limits:
        return Limits(
            writes=WriteLimits(
                rows_per_request=self.writes.rows_per_request,
                bytes_per_request=self.writes.bytes_per_request,
                in_flight=self.writes.in_flight_per_collection,
            ),
            assignment_bytes=self.memory_mib * MIB * 3 // 4,
            reconcile_seconds=self.reconcile_seconds,
        )


def load(path: Path | None) -> Settings:
    """Raises UserError naming the key that is wrong."""
    if path is None:
        return Settings()
    try:
        data = plain_yaml.load_file(path) or {}
    except OSError as error:
        raise UserError("CONFIG_UNREADABLE", f"{path}: {error.strerror}") from error
    except plain_yaml.BadYamlError as error:
        place = f"line {error.line}: " if error.line else ""
        raise UserError("CONFIG_INVALID", f"{path} is not YAML: {place}{error}") from error
    if not isinstance(data, dict):
        raise UserError("CONFIG_INVALID", f"{path} must hold keys and values")
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError("CONFIG_INVALID", f"{path}: {key}: {first['msg']}", field=key) from error
    fault = settings.fault()
    if fault is not None:
        key, why = fault
        raise UserError("CONFIG_INVALID", f"{path}: {key}: {why}", field=key)
    return settings
