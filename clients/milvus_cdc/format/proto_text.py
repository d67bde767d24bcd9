"""A file descriptor as the text of a .proto file, which is how a registry keeps it.

Only what our own descriptors consist of: proto3, messages, nested messages, optional and repeated
fields of scalars and of messages of the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from google.protobuf import descriptor_pb2

_Field = descriptor_pb2.FieldDescriptorProto


def render(
    file: descriptor_pb2.FileDescriptorProto, comments: Mapping[str, str] | None = None
) -> str:
    """`comments` by field name, one line each."""
    lines = ['syntax = "proto3";', "", f"package {file.package};"]
    for message in file.message_type:
        lines += ["", *_message(message, f".{file.package}.", comments or {})]
    return "\n".join(lines) + "\n"


def _message(
    message: descriptor_pb2.DescriptorProto, scope: str, comments: Mapping[str, str]
) -> Iterator[str]:
    yield f"message {message.name} {{"
    inner = f"{scope}{message.name}."
    for nested in message.nested_type:
        yield from (f"  {line}" for line in _message(nested, inner, {}))
    for field in message.field:
        if field.name in comments:
            yield f"  // {' '.join(comments[field.name].split())}"
        label = ""
        if field.label == _Field.LABEL_REPEATED:
            label = "repeated "
        elif field.proto3_optional:
            label = "optional "
        options = f' [json_name = "{field.json_name}"]' if field.json_name else ""
        yield f"  {label}{_type(field, scope, inner)} {field.name} = {field.number}{options};"
    yield "}"


def _type(field: descriptor_pb2.FieldDescriptorProto, scope: str, inner: str) -> str:
    if field.type == _Field.TYPE_MESSAGE:
        return field.type_name.removeprefix(inner).removeprefix(scope)
    return _Field.Type.Name(field.type).removeprefix("TYPE_").lower()
