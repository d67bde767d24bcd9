"""Commands about holds: what keeps the logs of sources on Pulsar, and what was left over there."""

from __future__ import annotations

import argparse
from typing import Any

from milvuscdc.v1 import hold_pb2, task_pb2

from milvus_cdc.cli import output
from milvus_cdc.cli.commands import read_text
from milvus_cdc.cli.task_file import parse_task
from milvus_cdc.control import ControlClient

HEAD = ("NAME", "STATE", "ENTRIES", "BYTES", "TASKS", "REASON")


def add_commands(groups: Any, shared: argparse.ArgumentParser) -> None:
    parser = groups.add_parser("hold", help="what keeps logs on Pulsar from being deleted unread")
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = parsers.add_parser(
        "list", parents=[shared], help="with --task or -f, orphans at that queue, too"
    )
    listing.set_defaults(run=list_holds)
    deleting = parsers.add_parser("delete", parents=[shared], help="remove an orphan")
    deleting.add_argument("name", metavar="HOLD", help="as `hold list` shows it")
    deleting.add_argument(
        "--forget", action="store_true", help="one being removed whose queue is gone for good"
    )
    deleting.set_defaults(run=delete_hold)
    for each in (listing, deleting):
        where = each.add_mutually_exclusive_group()
        where.add_argument("--task", default="", metavar="NAME", help="at this task's queue")
        where.add_argument(
            "-f", "--file", default="", help="at the queue of this task file's source; - for stdin"
        )


def _source(args: argparse.Namespace) -> task_pb2.Source | None:
    """Raises InputError."""
    return parse_task(read_text(args.file)).source if args.file else None


async def list_holds(client: ControlClient, args: argparse.Namespace) -> int:
    found = await client.list_holds(task=args.task, source=_source(args))
    output.show_list("holds", found, args.output, HEAD, _line)
    return 0


async def delete_hold(client: ControlClient, args: argparse.Namespace) -> int:
    name = args.name if args.name.startswith("holds/") else f"holds/{args.name}"
    await client.delete_hold(name, task=args.task, source=_source(args), forget=args.forget)
    print(f"{name} {'forgotten' if args.forget else 'removed'}")
    return 0


def _line(hold: hold_pb2.Hold) -> output.Line:
    return (
        hold.name.removeprefix("holds/"),
        hold_pb2.HoldState.Name(hold.state).removeprefix("HOLD_STATE_"),
        str(hold.backlog_entries) if hold.backlog_entries >= 0 else "-",
        str(hold.backlog_bytes) if hold.backlog_bytes >= 0 else "-",
        " ".join(task.removeprefix("tasks/") for task in hold.tasks) or "-",
        " ".join(filter(None, (hold.reason, hold.message))),
    )
