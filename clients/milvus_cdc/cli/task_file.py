"""A task written as YAML or JSON, read strictly: what cannot be meant is refused with its line.

The text is the proto3 JSON mapping of a milvuscdc.v1 message. Unknown and repeated keys, a secret
written out, and a choice made twice or not at all are errors that name the place.
"""

from __future__ import annotations

import difflib
from typing import Any, cast

import yaml
from buf.validate import validate_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from milvuscdc.v1 import secret_pb2, task_pb2

from milvus_cdc import plain_yaml
from milvus_cdc.errors import UserError

_SECRET = secret_pb2.Secret.DESCRIPTOR.full_name
_IN_PARTS = ("selection", "carry", "batching", "limits", "split")
"""Fields of a task that a patch changes part by part."""
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"


class InputError(UserError):
    """The text is not what it should be; `line` counts from 1, 0 when unknown."""

    def __init__(
        self, reason: str, message: str, advice: str, *, field: str = "", line: int = 0
    ) -> None:
        super().__init__(reason, message, field=field)
        self.advice = advice
        self.line = line


def parse_task(text: str) -> task_pb2.Task:
    """Raises InputError."""
    task = task_pb2.Task()
    _parse(text, task, partial=False)
    return task


def parse_patch(text: str) -> tuple[task_pb2.Task, list[str]]:
    """A part of a task, and the field mask that says which part. Raises InputError."""
    task = task_pb2.Task()
    data = _parse(text, task, partial=True)
    mask = []
    fields = {f.json_name: f for f in task.DESCRIPTOR.fields} | dict(task.DESCRIPTOR.fields_by_name)
    for key, value in data.items():
        name = fields[key].name
        if name in ("name", "etag"):
            continue
        if name in _IN_PARTS and isinstance(value, dict) and value:
            kind = cast("Descriptor", fields[key].message_type)
            known = {f.json_name: f.name for f in kind.fields}
            mask += [f"{name}.{known.get(part, part)}" for part in value]
        else:
            mask.append(name)
    return task, sorted(mask)


def _parse(text: str, message: Message, *, partial: bool) -> dict[str, Any]:
    try:
        node, loader = plain_yaml.compose(text)
    except plain_yaml.BadYamlError as err:
        raise _not_yaml(err) from err
    try:
        if not isinstance(node, yaml.MappingNode):
            raise InputError(
                "INVALID_FILE",
                "the file does not hold a task",
                "write `name: tasks/…`, `source:`, `sink:`, `selection:` and `start:` at the top",
                line=1,
            )
        _check(node, cast("Descriptor", message.DESCRIPTOR), "", partial)
        data: dict[str, Any] = plain_yaml.construct(node, loader)
    except plain_yaml.BadYamlError as err:
        raise _not_yaml(err) from err
    finally:
        loader.dispose()
    try:
        json_format.ParseDict(data, message)
    except json_format.ParseError as err:
        raise InputError("INVALID_FILE", str(err).rstrip("."), "correct that value") from err
    return data


def _not_yaml(err: plain_yaml.BadYamlError) -> InputError:
    advice = "check indentation and quotes there" if err.line else "save it as plain UTF-8 text"
    return InputError("INVALID_FILE", f"not YAML: {err}", advice, line=err.line)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _check(node: yaml.Node, kind: Descriptor, path: str, partial: bool) -> None:
    where = path or "the task"
    if not isinstance(node, yaml.MappingNode):
        known = ", ".join(f.json_name for f in kind.fields) or "nothing"
        raise InputError(
            "INVALID_FILE",
            f"{where} must be a mapping",
            f"write `{path.rpartition('.')[2]}: {{…}}` with: {known}"
            if kind.fields
            else f"write `{path.rpartition('.')[2]}: {{}}`",
            field=path,
            line=_line(node),
        )
    by_name = {f.json_name: f for f in kind.fields} | dict(kind.fields_by_name)
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        key = str(key_node.value)
        field = by_name.get(key)
        if field is None or key_node.tag == _MERGE:
            raise _unknown(key, kind, path, _line(key_node))
        if field.name in seen:
            raise InputError(
                "DUPLICATE_KEY",
                f"{_join(path, key)} is written twice (first in line {seen[field.name]})",
                "keep one of them",
                field=_join(path, key),
                line=_line(key_node),
            )
        seen[field.name] = _line(key_node)
        if value.tag != _NULL:
            _check_value(value, field, _join(path, key), partial)
    present = {by_name[str(k.value)].name for k, v in node.value if v.tag != _NULL}
    if not partial or path:
        _check_choices(node, kind, path, present)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _unknown(key: str, kind: Descriptor, path: str, line: int) -> InputError:
    names = [f.json_name for f in kind.fields]
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(key.lower().replace("_", ""), lowered, n=1, cutoff=0.5)
    advice = f"did you mean `{lowered[near[0]]}`?" if near else f"known here: {', '.join(names)}"
    return InputError(
        "UNKNOWN_KEY",
        f"unknown key `{_join(path, key)}`",
        advice,
        field=_join(path, key),
        line=line,
    )


def _check_value(node: yaml.Node, field: FieldDescriptor, path: str, partial: bool) -> None:
    kind = field.message_type
    if kind is None:
        return
    if kind.GetOptions().map_entry:
        _check_map(node, path)
    elif kind.full_name.startswith("google.protobuf."):
        return
    elif field.is_repeated:
        for index, item in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
            _check(item, kind, f"{path}[{index}]", partial)
    elif kind.full_name == _SECRET and isinstance(node, yaml.ScalarNode):
        raise InputError(
            "LITERAL_SECRET",
            f"{path} is written out; a secret is a mapping",
            f"use `{path.rpartition('.')[2]}: {{env: NAME}}` or `{{file: PATH}}`,"
            " read where the replicator runs, or `{literal: SECRET}` at a controller with "
            "secretsKeys",
            field=path,
            line=_line(node),
        )
    else:
        _check(node, kind, path, partial)


def _check_map(node: yaml.Node, path: str) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        key = str(key_node.value)
        if key in seen:
            raise InputError(
                "DUPLICATE_KEY",
                f"{path}.{key} is written twice (first in line {seen[key]})",
                "keep one of them",
                field=f"{path}.{key}",
                line=_line(key_node),
            )
        seen[key] = _line(key_node)


def _check_choices(node: yaml.Node, kind: Descriptor, path: str, present: set[str]) -> None:
    for choice in kind.oneofs:
        names = [f.json_name for f in choice.fields]
        chosen = [f.json_name for f in choice.fields if f.name in present]
        required = choice.GetOptions().Extensions[validate_pb2.oneof].required
        if len(chosen) > 1:
            fields = " and ".join(_join(path, name) for name in chosen)
            raise InputError(
                "TOO_MANY_CHOICES",
                f"{fields} exclude each other",
                "keep one of them",
                field=path,
                line=_line(node),
            )
        if required and not chosen:
            raise InputError(
                "CHOICE_MISSING",
                f"{path or 'the task'} names none of {', '.join(names)}",
                f"add one, for example `{names[0]}: {{…}}`",
                field=path,
                line=_line(node),
            )
