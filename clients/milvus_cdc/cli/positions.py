"""`milvus-cdc task positions` and `set-positions`: where a task stands in the log, and putting it
elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from milvuscdc.v1 import task_pb2
from milvuscdc.v1.task_service_pb2 import VchannelPosition

from milvus_cdc.cli import output
from milvus_cdc.cli.commands import read_text
from milvus_cdc.cli.position_file import FilePosition, parse_positions, pchannel_of
from milvus_cdc.cli.task_file import InputError
from milvus_cdc.control import ControlClient
from milvus_cdc.control.names import task_name
from milvus_cdc.model import tso_to_ms, tso_to_text
from milvus_cdc.source.registry import position_text

HEAD = ("COLLECTION", "VCHANNEL", "POSITION", "TICK", "TIME", "QUEUE KEEPS IT FOR")
SET_HEAD = ("VCHANNEL", "POSITION", "TICK", "TIME", "BEFORE", "CHANGE")

Shard = tuple[task_pb2.TaskCollection, task_pb2.VchannelProgress]


async def positions(client: ControlClient, args: argparse.Namespace) -> int:
    shards = list(_shards(await client.list_collections(args.name)))
    if args.output == "table":
        output.show_table(HEAD, [_line(*shard) for shard in shards])
    else:
        listed = [_plain(*shard) for shard in shards]
        output.show_data({"task": task_name(args.name), "positions": listed}, args.output)
    return 0


async def set_positions(client: ControlClient, args: argparse.Namespace) -> int:
    if args.from_file and args.collection:
        raise InputError(
            "INVALID_ARGUMENT",
            "--collection goes with --at; a file names its channels itself",
            "leave out --collection, or what is not meant out of the file",
        )
    before = {
        shard.vchannel: shard for _, shard in _shards(await client.list_collections(args.name))
    }
    given: list[VchannelPosition] = []
    if args.from_file:
        listed = parse_positions(await asyncio.to_thread(read_text, args.from_file))
        given = _resolve(listed, args.name, await client.list_collections(args.name))
    placed = await client.set_positions(
        args.name,
        positions=given,
        at=None if args.from_file else parse_time(args.at),
        collections=args.collection,
        validate_only=args.dry_run,
    )
    if args.output == "table":
        output.show_table(SET_HEAD, [_set_line(p, before.get(p.vchannel)) for p in placed])
        print(
            "nothing was set: this was a dry run"
            if args.dry_run
            else f"set; `milvus-cdc task resume {args.name}` goes on from there"
        )
    else:
        data = [_plain_position(p) | {"change": _change(p, before.get(p.vchannel))} for p in placed]
        name = task_name(args.name)
        output.show_data({"task": name, "dryRun": args.dry_run, "positions": data}, args.output)
    return 0


def parse_time(text: str) -> datetime:
    """Raises InputError."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise InputError(
            "INVALID_TIME",
            f"{text!r} is no time with a zone",
            "write it like 2026-11-21T09:30:00Z or 2026-11-21T10:30:00+01:00",
        )
    return at.astimezone(UTC)


def _shards(collections: Sequence[task_pb2.TaskCollection]) -> Iterator[Shard]:
    """Those whose log has not ended."""
    for collection in collections:
        for shard in collection.vchannels:
            if not shard.closed:
                yield collection, shard


def _resolve(
    listed: list[FilePosition], name: str, collections: Sequence[task_pb2.TaskCollection]
) -> list[VchannelPosition]:
    """For the task's vchannels. What others wrote may speak of more than the task follows."""
    known = {shard.vchannel: collection.collection_id for collection, shard in _shards(collections)}
    result: dict[str, VchannelPosition] = {}
    strange = []
    for item in listed:
        on_it = [
            vchannel
            for vchannel, collection_id in known.items()
            if item.channel in (vchannel, pchannel_of(vchannel))
            and item.collection_id in (0, collection_id)
        ]
        if item.own:
            on_it = [item.channel]
        if not on_it:
            strange.append(item.channel)
        for vchannel in on_it:
            position = VchannelPosition(
                vchannel=vchannel, read_from=item.read_from, resolved_ts=item.resolved_ts
            )
            if result.setdefault(vchannel, position) != position:
                raise InputError(
                    "VCHANNEL_TWICE", f"{vchannel} has two positions", "leave one in the file"
                )
    if not result:
        raise InputError(
            "UNKNOWN_VCHANNEL",
            f"the file speaks of no vchannel that {task_name(name)} follows, but of "
            f"{', '.join(strange[:3])}",
            f"`milvus-cdc task positions {name}` shows the vchannels",
        )
    if strange:
        print(f"not followed by {task_name(name)}, left out: {', '.join(strange)}", file=sys.stderr)
    return list(result.values())


def _line(collection: task_pb2.TaskCollection, shard: task_pb2.VchannelProgress) -> output.Line:
    return (
        f"{collection.database}.{collection.collection}",
        shard.vchannel,
        shard.read_from_text or position_text(shard.read_from),
        str(shard.resolved_ts) if shard.resolved_ts else "-",
        _time(shard.resolved_ts) or "-",
        _left(shard),
    )


def _left(shard: task_pb2.VchannelProgress) -> str:
    parts = []
    if shard.HasField("retention_left"):
        parts.append(f"{shard.retention_left.ToSeconds() / 3600:.2f} h")
    if shard.retention_left_bytes >= 0:
        parts.append(f"{shard.retention_left_bytes / (1 << 20):.1f} MiB")
    return " or ".join(parts) or "-"


def _plain(collection: task_pb2.TaskCollection, shard: task_pb2.VchannelProgress) -> dict[str, Any]:
    position = VchannelPosition(
        vchannel=shard.vchannel, read_from=shard.read_from, resolved_ts=shard.resolved_ts
    )
    result = {"collection": f"{collection.database}.{collection.collection}"}
    result |= _plain_position(position)
    if shard.HasField("retention_left"):
        result["retentionLeft"] = shard.retention_left.ToJsonString()
    if shard.retention_left_bytes >= 0:
        result["retentionLeftBytes"] = str(shard.retention_left_bytes)
    return result


def _plain_position(position: VchannelPosition) -> dict[str, Any]:
    result = {
        "vchannel": position.vchannel,
        "position": position_text(position.read_from),
        "readFrom": base64.b64encode(position.read_from).decode(),
        "resolvedTs": str(position.resolved_ts),
    }
    if position.resolved_ts:
        result["time"] = _time(position.resolved_ts)
    return result


def _set_line(position: VchannelPosition, before: task_pb2.VchannelProgress | None) -> output.Line:
    return (
        position.vchannel,
        position_text(position.read_from),
        str(position.resolved_ts) if position.resolved_ts else "-",
        _time(position.resolved_ts) or "-",
        (_time(before.resolved_ts) if before else "") or "-",
        _change(position, before),
    )


def _change(position: VchannelPosition, before: task_pb2.VchannelProgress | None) -> str:
    """What it means for the rows."""
    old_ts = before.resolved_ts if before is not None else 0
    if not position.resolved_ts:
        return "all rows behind this position are applied, none before it"
    seconds = (tso_to_ms(position.resolved_ts) - tso_to_ms(old_ts)) / 1000
    if not old_ts:
        return "forward: rows up to this time are not carried"
    if seconds > 0:
        return f"forward {seconds:.1f} s: rows in between are not carried"
    return f"back {-seconds:.1f} s: rows in between are applied again" if seconds else "none"


def _time(ts: int) -> str:
    """Empty for 0."""
    return tso_to_text(ts) if ts else ""
