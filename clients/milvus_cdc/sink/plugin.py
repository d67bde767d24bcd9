"""Sinks and formats that other packages bring.

A package registers a class under the entry point group `milvus_cdc.sinks` or `milvus_cdc.formats`;
a task names it in `sink.plugin.name` or `format.plugin.name`. The class has

- `CONFIG_SCHEMA`: a JSON Schema (draft 2020-12) of its configuration. A value under a property
  marked `"secret": true` is a reference, `{env: NAME}` or `{file: PATH}`, and arrives resolved;
  properties may be nested in objects and in the items of lists;
- `__init__(config: dict)`: called with a configuration that fits the schema; no I/O, it may raise
  `milvus_cdc.errors.UserError` naming the field at fault relative to its configuration.

and is a `milvus_cdc.sink.writer.Writer` (without `heartbeat` where it claims none) or a
`milvus_cdc.format.Format`.

Law: no message shows the value of a secret, nor what was written in place of a reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import jsonschema
from google.protobuf import json_format, struct_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.format import Format
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.writer import Writer

SINKS = "milvus_cdc.sinks"
FORMATS = "milvus_cdc.formats"

_PROTOCOLS: dict[str, type] = {SINKS: Writer, FORMATS: Format}


def load(
    group: str,
    name: str,
    config: struct_pb2.Struct,
    *,
    secrets: SecretResolver,
    field: str,
) -> Any:
    """The configured instance. Raises UserError PLUGIN_UNKNOWN, PLUGIN_BROKEN, INVALID_FIELD, those
    of secrets, and what the plugin itself raises; `field` is the place of the plugin in the task.
    """
    point = _find(group, name, field)
    try:
        plugin = point.load()
        schema = plugin.CONFIG_SCHEMA
        jsonschema.Draft202012Validator.check_schema(schema)
        _check_secrets_can_be_found(schema)
    except Exception as error:
        text = f"{type(error).__name__}: {getattr(error, 'message', error)}"
        raise _broken(point, f"cannot be loaded: {text}", field) from error
    values = _numbers(json_format.MessageToDict(config))
    check(values, schema, field=f"{field}.config")
    found: list[str] = []
    resolved = _resolve(values, schema, secrets, f"{field}.config", found)
    try:
        made = plugin(resolved)
    except UserError as error:
        error.field = f"{field}.config.{error.field}" if error.field else f"{field}.config"
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        for secret in found:
            text = text.replace(secret, "***")
        raise _broken(point, f"does not take its configuration: {text}", field) from None
    if missing := [each for each in _needed(group, made) if not hasattr(made, each)]:
        raise _broken(point, f"has no {', '.join(missing)}", field)
    return made


def _needed(group: str, made: Any) -> list[str]:
    names = [each for each in vars(_PROTOCOLS[group]) if not each.startswith("_")]
    if not getattr(getattr(made, "capabilities", None), "heartbeats", False):
        names = [each for each in names if each != "heartbeat"]
    return names


def _find(group: str, name: str, field: str) -> EntryPoint:
    points = tuple(entry_points(group=group))
    found = {each.value: each for each in points if each.name == name}
    if len(found) > 1:
        raise UserError(
            "PLUGIN_BROKEN",
            f"{name!r} is registered under {group} more than once ({', '.join(sorted(found))}); "
            "uninstall all but one of the packages",
            field=f"{field}.name",
        )
    for point in found.values():
        return point
    names = sorted({each.name for each in points})
    raise UserError(
        "PLUGIN_UNKNOWN",
        f"no installed package registers {name!r} under {group} on this replicator; there are "
        f"{', '.join(names) or 'none'}. Install it beside milvus-cdc-replicator",
        field=f"{field}.name",
    )


def _broken(point: EntryPoint, what: str, field: str) -> UserError:
    text = f"{point.name!r} ({point.value}) {what}; ask whoever made it"
    return UserError("PLUGIN_BROKEN", text, field=f"{field}.name")


def check(values: Mapping[str, Any], schema: Mapping[str, Any], *, field: str) -> None:
    """Raises UserError INVALID_FIELD naming the first place that does not fit."""
    _check_references(values, schema, field)
    validator = jsonschema.Draft202012Validator(_with_references(schema))
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
_REFERENCES = jsonschema.Draft202012Validator(_REFERENCE)


def _is_secret(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("secret") is True


def _part(schema: Any, at: str | int) -> Any:
    """The schema of a member of an object or of a list; None when nothing is said of it here."""
    if not isinstance(schema, dict):
        return None
    if isinstance(at, int):
        return schema.get("items")
    parts = schema.get("properties")
    return parts.get(at) if isinstance(parts, dict) else None


def _members(values: Any, field: str) -> list[tuple[str | int, Any, str]]:
    """With the place of each."""
    if isinstance(values, dict):
        return [(key, value, f"{field}.{key}") for key, value in values.items()]
    if isinstance(values, list):
        return [(at, value, f"{field}[{at}]") for at, value in enumerate(values)]
    return []


def _check_secrets_can_be_found(schema: Any) -> None:
    """One that is marked elsewhere (below `anyOf`, `$defs`) would arrive as its reference."""

    def count(part: Any) -> int:
        if isinstance(part, list):
            return sum(map(count, part))
        if not isinstance(part, dict):
            return 0
        parts = part.get("properties")
        # Its keys are names, not words of a schema.
        named = list(parts.values()) if isinstance(parts, dict) else []
        others = [each for key, each in part.items() if key != "properties"]
        return int(_is_secret(part)) + sum(map(count, named + others))

    def reached(part: Any) -> int:
        if not isinstance(part, dict):
            return 0
        if _is_secret(part):
            return 1
        parts = part.get("properties")
        below = list(parts.values()) if isinstance(parts, dict) else []
        return sum(map(reached, [*below, part.get("items")]))

    if count(schema) != reached(schema):
        raise ValueError(
            "CONFIG_SCHEMA marks a secret where none can be: properties and items only"
        )


def _with_references(schema: Any) -> Any:
    """The schema with every secret as the reference that a task holds."""
    if _is_secret(schema):
        return _REFERENCE
    if not isinstance(schema, dict):
        return schema
    changed = dict(schema)
    if isinstance(parts := schema.get("properties"), dict):
        changed["properties"] = {key: _with_references(part) for key, part in parts.items()}
    if "items" in schema:
        changed["items"] = _with_references(schema["items"])
    return changed


def _check_references(values: Any, schema: Any, field: str) -> None:
    """Before anything else is looked at: the validator's messages show values."""
    if not _is_secret(schema):
        for at, value, place in _members(values, field):
            _check_references(value, _part(schema, at), place)
    elif not _REFERENCES.is_valid(values):
        raise UserError(
            "INVALID_FIELD",
            f"{field} is a secret: write {{env: NAME}} or {{file: PATH}}, not the value itself",
            field=field,
        )


def _resolve(
    values: Any, schema: Any, secrets: SecretResolver, field: str, found: list[str]
) -> Any:
    """Values with their secrets, which are added to `found`."""
    if _is_secret(schema):
        if "env" in values:
            secret = secrets.env(values["env"], field=field)
        else:
            secret = secrets.file(values["file"], field=field)
        found.append(secret)
        return secret
    made = {
        at: _resolve(value, _part(schema, at), secrets, place, found)
        for at, value, place in _members(values, field)
    }
    if isinstance(values, dict):
        return made
    return list(made.values()) if isinstance(values, list) else values


def _numbers(value: Any) -> Any:
    """A Struct knows floats only: whole ones become ints again."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
