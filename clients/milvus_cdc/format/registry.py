"""Which format a task's `format` means. Modules are imported when a task first asks for theirs."""

from __future__ import annotations

from milvuscdc.v1 import format_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.format import Format
from milvus_cdc.format.json_cells import JsonStyle
from milvus_cdc.secrets import SecretResolver


def open_format(spec: format_pb2.Format, secrets: SecretResolver, field: str) -> Format:
    """No I/O yet; flat JSON where nothing is chosen. `field` is the format's place in the task, for
    example `sink.kafka.format`. Raises UserError for a secret that cannot be resolved, a plugin
    that is not there, or settings that contradict each other.
    """
    match spec.WhichOneof("kind"):
        case None | "flat_json":
            from milvus_cdc.format.flat_json import FlatJson

            return FlatJson(_style(spec.flat_json.values))
        case "debezium_json":
            from milvus_cdc.format.debezium_json import DebeziumJson

            debezium = spec.debezium_json
            return DebeziumJson(_style(debezium.values), with_schema=debezium.with_schema)
        case "cloud_events_json":
            from milvus_cdc.format.cloud_events import CloudEventsJson

            events = spec.cloud_events_json
            return CloudEventsJson(_style(events.values), events.source)
        case "legacy_json":
            from milvus_cdc.format.legacy_json import LegacyJson

            return LegacyJson()
        case "avro":
            from milvus_cdc.format.avro import AvroFormat
            from milvus_cdc.format.schema_registry import Registry

            registry = Registry(spec.avro.registry, secrets, f"{field}.avro.registry")
            return AvroFormat(registry, arrays=_arrays(spec.avro.vectors))
        case "protobuf":
            from milvus_cdc.format.protobuf import ProtobufFormat
            from milvus_cdc.format.schema_registry import Registry

            registry = Registry(spec.protobuf.registry, secrets, f"{field}.protobuf.registry")
            return ProtobufFormat(registry, arrays=_arrays(spec.protobuf.vectors))
        case "plugin":
            from milvus_cdc.sink import plugin

            loaded: Format = plugin.load(
                plugin.FORMATS,
                spec.plugin.name,
                spec.plugin.config,
                secrets=secrets,
                field=f"{field}.plugin",
            )
            return loaded
        case other:
            raise UserError(
                "FORMAT_UNKNOWN", f"no format of kind {other!r} is known here", field=field
            )


def _style(values: format_pb2.JsonValues) -> JsonStyle:
    return JsonStyle(
        base64_vectors=values.vectors == format_pb2.VECTOR_ENCODING_BASE64,
        int64_as_string=values.int64_as_string,
    )


def _arrays(vectors: format_pb2.BinaryVectors.ValueType) -> bool:
    return vectors == format_pb2.BINARY_VECTORS_ARRAY
