"""Positions as `task positions`, milvus-backup and milvus-cdc (zilliztech) write them, told apart
by their shape.

Law: a position counts only for the channel that it names itself. Shapes and names are those of
milvus-backup `core/proto/backup.proto` (`channel_checkpoints`, JSON of its meta files) and
milvus-cdc `server/model` (create request, answer to get position); both hold base64 of
`msg.MsgPosition`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from milvus_cdc import plain_yaml
from milvus_cdc.cli.task_file import InputError

KNOWN_SHAPES = (
    "give what `milvus-cdc task positions -o json` prints, a meta file of milvus-backup, or a "
    "create request or get-position answer of milvus-cdc"
)


@dataclass(frozen=True, slots=True)
class FilePosition:
    channel: str
    """A vchannel, or a pchannel and then meant for every vchannel on it."""
    read_from: bytes
    resolved_ts: int
    collection_id: int = 0
    """Only this collection's vchannels; 0 = of any."""
    own: bool = False
    """Written by `task positions`."""


def pchannel_of(vchannel: str) -> str:
    return vchannel.rpartition("_")[0]


def parse_positions(text: str) -> list[FilePosition]:
    """Raises InputError."""
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise _bad("nested too deeply", "INVALID_FILE", KNOWN_SHAPES) from error
    except ValueError:
        try:
            data = plain_yaml.load(text)
        except plain_yaml.BadYamlError as error:
            raise _bad("neither JSON nor YAML", "INVALID_FILE", KNOWN_SHAPES) from error
    if isinstance(data, Mapping):
        for inner in ("request_data", "data"):
            if isinstance(data.get(inner), Mapping):
                data = data[inner]
        found = list(_own(data) or _of_backup(data) or _of_cdc(data))
        if found:
            return found
    raise _bad("the file holds no positions", "UNKNOWN_SHAPE", KNOWN_SHAPES)


def _own(data: Mapping[str, Any]) -> list[FilePosition]:
    listed = data.get("positions")
    if not isinstance(listed, list) or not all(_has(item, "vchannel") for item in listed):
        return []
    return [
        FilePosition(
            str(item["vchannel"]),
            _base64(str(item["vchannel"]), item.get("readFrom")),
            _number(str(item["vchannel"]), item.get("resolvedTs", 0)),
            own=True,
        )
        for item in listed
    ]


def _of_backup(data: Mapping[str, Any]) -> list[FilePosition]:
    """A collection's meta, the list of all, or the root."""
    found: list[FilePosition] = []
    for name in ("channel_checkpoints", "channelCheckpoints"):
        found += _encoded(data.get(name))
    for name in ("infos", "collection_backups", "collectionBackups"):
        for item in _list(data.get(name)):
            found += _of_backup(item)
    return found


def _of_cdc(data: Mapping[str, Any]) -> list[FilePosition]:
    positions = data.get("positions")
    found = list(_encoded(positions))
    for item in _list(data.get("collection_infos")):
        found += _encoded(item.get("positions"))
    for item in _list(positions):
        channel = str(item.get("channel_name", ""))
        if channel and "msg_id" in item:
            found.append(
                _position(
                    channel,
                    item["msg_id"],
                    _number(channel, item.get("tt", 0)),
                    _number(channel, item.get("collection_id", 0)),
                )
            )
    return found


def _encoded(by_channel: object) -> Iterator[FilePosition]:
    if isinstance(by_channel, Mapping):
        for channel, value in by_channel.items():
            yield _position(str(channel), value)


def _position(
    channel: str, value: object, resolved_ts: int = 0, collection_id: int = 0
) -> FilePosition:
    # Imported on use: no other command needs Milvus' messages.
    from milvus_cdc.milvus_protos import msg_pb2

    try:
        position = msg_pb2.MsgPosition.FromString(_base64(channel, value))
    except DecodeError as error:
        raise _bad(f"the position of {channel} is no MsgPosition") from error
    if not position.msgID:
        raise _bad(f"the position of {channel} has no message id")
    named = position.channel_name
    if named and named != channel and channel not in (named, pchannel_of(named)):
        if pchannel_of(channel) != named:
            raise _bad(
                f"the position given for {channel} is one of {named}", "POSITION_OF_OTHER_CHANNEL"
            )
    return FilePosition(
        channel, position.msgID, position.timestamp or resolved_ts, max(collection_id, 0)
    )


def _base64(channel: str, value: object) -> bytes:
    try:
        decoded = base64.b64decode(str(value or ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(f"the position of {channel} is not base64: {value!r}") from error
    if not decoded:
        raise _bad(f"{channel} has no position")
    return decoded


def _number(channel: str, value: object) -> int:
    try:
        number = int(str(value))
    except ValueError as error:
        raise _bad(f"the timestamp of {channel} is no number: {value!r}") from error
    if not 0 <= number < 1 << 64:
        raise _bad(f"the timestamp of {channel} is out of range: {value!r}")
    return number


def _list(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _has(item: object, key: str) -> bool:
    return isinstance(item, Mapping) and key in item


def _bad(
    message: str, reason: str = "BAD_POSITION", advice: str = "write the file anew"
) -> InputError:
    return InputError(reason, message, advice)
