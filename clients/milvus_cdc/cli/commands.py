"""What each `milvus-cdc` command does with the API."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from milvuscdc.v1 import task_pb2, task_service_pb2

from milvus_cdc.cli import output
from milvus_cdc.cli.task_file import InputError, parse_patch, parse_task
from milvus_cdc.control import ControlClient
from milvus_cdc.control.names import task_name

_WATCH_SECONDS = 2.0


def read_text(path: str) -> str:
    """Raises InputError."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(
            "INVALID_FILE",
            f"cannot read {path}: {err}",
            "give a readable UTF-8 file, or - for stdin",
        ) from err


def labels_of(pairs: Sequence[str]) -> dict[str, str]:
    """Raises InputError unless every one is `key=value`."""
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError("INVALID_LABEL", f"{pair!r} is no label", "write --label key=value")
        labels[key] = value
    return labels


def carry_of(pairs: Sequence[str]) -> dict[str, bool]:
    """Raises InputError unless every one is `kind=true` or `kind=false`."""
    kinds = [field.name for field in task_pb2.Carry.DESCRIPTOR.fields]
    carried = {}
    for pair in pairs:
        kind, _, value = pair.partition("=")
        if kind not in kinds or value.lower() not in ("true", "false"):
            raise InputError(
                "INVALID_CARRY",
                f"{pair!r} says nothing about what to carry",
                f"write --carry KIND=true or KIND=false; kinds are {', '.join(kinds)}",
            )
        carried[kind] = value.lower() == "true"
    return carried


def _show_task(task: task_pb2.Task, form: str) -> None:
    output.show_item(task, form, output.TASK_HEAD, output.task_line)


async def create(client: ControlClient, args: argparse.Namespace) -> int:
    task = parse_task(await asyncio.to_thread(read_text, args.file))
    made = await client.create_task(
        task, request_id=args.request_id, validate_only=args.validate_only
    )
    if args.output == "table":
        print(f"{made.name} {'is valid; nothing was stored' if args.validate_only else 'created'}")
    else:
        _show_task(made, args.output)
    return 0


async def list_tasks(client: ControlClient, args: argparse.Namespace) -> int:
    states = [task_pb2.TaskState.Value(f"TASK_STATE_{state.upper()}") for state in args.state]
    tasks = await client.list_tasks(states=states, labels=labels_of(args.label))
    output.show_list("tasks", tasks, args.output, output.TASK_HEAD, output.task_line)
    return 0


async def get(client: ControlClient, args: argparse.Namespace) -> int:
    _show_task(await client.get_task(args.name), args.output)
    return 0


async def watch(client: ControlClient, args: argparse.Namespace) -> int:
    kinds = task_service_pb2.WatchTasksResponse.Type
    async for event in client.watch_tasks(name=args.name or ""):
        if args.output != "table":
            output.show_event(output.to_dict(event), args.output)
        elif event.type != task_service_pb2.WatchTasksResponse.TYPE_BOOKMARK:
            what = kinds.Name(event.type).removeprefix("TYPE_").lower()
            line = output.task_line(event.task)
            print("  ".join([f"{what:<8}", *filter(None, line)]), flush=True)
    return 0


async def update(client: ControlClient, args: argparse.Namespace) -> int:
    task, mask = task_pb2.Task(), list[str]()
    if args.file:
        task, mask = parse_patch(await asyncio.to_thread(read_text, args.file))
        if task.name and task.name != task_name(args.name):
            raise InputError(
                "NAME_MISMATCH",
                f"the patch is for {task.name}, not {task_name(args.name)}",
                "leave `name` out of the patch, or name that task",
            )
    task.name = task_name(args.name)
    if args.include:
        task.selection.ClearField("include")
        task.selection.include.extend(args.include)
        mask.append("selection.include")
    if args.exclude or args.no_exclude:
        task.selection.ClearField("exclude")
        task.selection.exclude.extend(args.exclude)
        mask.append("selection.exclude")
    for kind, carried in carry_of(args.carry).items():
        setattr(task.carry, kind, carried)
        mask.append(f"carry.{kind}")
    if args.drift:
        task.drift = task_pb2.Drift.Value(f"DRIFT_{args.drift.upper()}")
        mask.append("drift")
    if args.label or args.no_label:
        current = await client.get_task(task.name)
        labels = dict(task.labels if "labels" in mask else current.labels)
        labels.update(labels_of(args.label))
        for key in args.no_label:
            labels.pop(key, None)
        task.labels.clear()
        task.labels.update(labels)
        # The labels were read first: refuse to overwrite what somebody else changes meanwhile.
        task.etag = task.etag or current.etag
        mask.append("labels")
    if not mask:
        raise InputError(
            "NOTHING_TO_CHANGE",
            "nothing to change was given",
            "give -f PATCH, --include, --exclude, --no-exclude, --carry, --drift, --label or "
            "--no-label",
        )
    changed = await client.update_task(task, sorted(set(mask)), validate_only=args.validate_only)
    _show_task(changed, args.output)
    return 0


async def pause(client: ControlClient, args: argparse.Namespace) -> int:
    _show_task(await client.pause_task(args.name), args.output)
    return 0


async def resume(client: ControlClient, args: argparse.Namespace) -> int:
    _show_task(await client.resume_task(args.name), args.output)
    return 0


async def delete(client: ControlClient, args: argparse.Namespace) -> int:
    await client.delete_task(args.name, allow_missing=args.allow_missing)
    if args.output == "table":
        print(f"{task_name(args.name)} deleted; what it wrote stays at the sink")
    else:
        output.show_data({}, args.output)
    return 0


async def retry(client: ControlClient, args: argparse.Namespace) -> int:
    _show_task(await client.retry_task(args.name, collection=args.collection), args.output)
    return 0


async def resync(client: ControlClient, args: argparse.Namespace) -> int:
    if not args.yes and not await asyncio.to_thread(_confirmed, args.name, args.collection):
        print("nothing was done", file=sys.stderr)
        return 2
    _show_task(await client.resync_collection(args.name, args.collection), args.output)
    return 0


def _confirmed(name: str, collection: str) -> bool:
    question = f"drop {collection} at the sink of {task_name(name)} and fill it again? [y/N] "
    if not sys.stdin.isatty():
        raise InputError(
            "CONFIRMATION_NEEDED",
            f"resync drops {collection} at the sink and fills it again",
            "add --yes if that is meant",
        )
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


async def collections(client: ControlClient, args: argparse.Namespace) -> int:
    while True:
        found = await client.list_collections(args.name)
        if args.watch and args.output == "table" and sys.stdout.isatty():
            sys.stdout.write("\x1b[H\x1b[2J")
        output.show_list(
            "collections", found, args.output, output.COLLECTION_HEAD, output.collection_line
        )
        if not args.watch:
            return 0
        await asyncio.sleep(_WATCH_SECONDS)


async def controllers(client: ControlClient, args: argparse.Namespace) -> int:
    found = await client.list_controllers()
    output.show_list(
        "controllers", found, args.output, output.CONTROLLER_HEAD, output.controller_line
    )
    return 0
