"""Sinks and formats that other packages bring.

A package registers a class under the entry point group `milvus_cdc.sinks` or `milvus_cdc.formats`;
a task names it in `sink.plugin.name` or `format.plugin.name`. The class has

- `CONFIG_SCHEMA`: a JSON Schema (draft 2020-12) of its configuration. A value under a property
  marked `"secret": true` is a reference, `{env: NAME}` or `{file: PATH}`, and arrives resolved;
- `__init__(config: dict)`: called with a configuration that fits the schema; no I/O, it may raise
  `milvus_cdc.errors.UserError` naming the field at fault relative to its configuration.

and is a `milvus_cdc.sink.writer.Writer` or a `milvus_cdc.format.Format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import jsonschema
from google.protobuf import json_format, struct_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver

SINKS = "milvus_cdc.sinks"
FORMATS = "milvus_cdc.formats"


def load(
    group: str,
    name: str,
    config: struct_pb2.Struct,
    *,
    secrets: SecretResolver,
    field: str,
) -> Any:
    """The configured instance. Raises UserError PLUGIN_UNKNOWN, PLUGIN_BROKEN or INVALID_FIELD;
    `field` is the place of the plugin in the task.
    """
    found = {each.name: each for each in entry_points(group=group)}
    if name not in found:
        raise UserError(
            "PLUGIN_UNKNOWN",
            f"no installed package registers {name!r} under {group} on this replicator; there are "
            f"{', '.join(sorted(found)) or 'none'}. Install it beside milvus-cdc-replicator",
            field=f"{field}.name",
        )
    try:
        plugin = found[name].load()
        schema = plugin.CONFIG_SCHEMA
    except Exception as error:
        raise UserError(
            "PLUGIN_BROKEN",
            f"{name!r} ({found[name].value}) cannot be loaded: {type(error).__name__}: {error}",
            field=f"{field}.name",
        ) from error
    values = _numbers(json_format.MessageToDict(config))
    check(values, schema, field=f"{field}.config")
    resolved = _resolve(values, schema, secrets, f"{field}.config")
    try:
        return plugin(resolved)
    except UserError as error:
        error.field = f"{field}.config.{error.field}" if error.field else f"{field}.config"
        raise


def check(values: Mapping[str, Any], schema: Mapping[str, Any], *, field: str) -> None:
    """Raises UserError INVALID_FIELD naming the first place that does not fit."""
    validator = jsonschema.Draft202012Validator(_with_secrets(schema))
    error = jsonschema.exceptions.best_match(validator.iter_errors(values))
    if error is not None:
        path = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in error.absolute_path)
        raise UserError("INVALID_FIELD", f"{field}{path}: {error.message}", field=f"{field}{path}")


_REFERENCE = {
    "type": "object",
    "oneOf": [{"required": ["env"]}, {"required": ["file"]}],
    "properties": {"env": {"type": "string"}, "file": {"type": "string"}},
    "additionalProperties": False,
}


def _with_secrets(schema: Any) -> Any:
    """The schema with every secret as the reference that a task holds."""
    if isinstance(schema, dict):
        if schema.get("secret") is True:
            return _REFERENCE
        return {key: _with_secrets(value) for key, value in schema.items()}
    return [_with_secrets(each) for each in schema] if isinstance(schema, list) else schema


def _resolve(values: Any, schema: Any, secrets: SecretResolver, field: str) -> Any:
    if not isinstance(schema, dict) or not isinstance(values, dict):
        return values
    if schema.get("secret") is True:
        if "env" in values:
            return secrets.env(values["env"], field=field)
        return secrets.file(values["file"], field=field)
    parts = schema.get("properties", {})
    return {
        key: _resolve(value, parts.get(key), secrets, f"{field}.{key}")
        for key, value in values.items()
    }


def _numbers(value: Any) -> Any:
    """A Struct knows floats only: whole ones become ints again."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
