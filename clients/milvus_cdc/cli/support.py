"""`support dump`: all that the controller shows, in one document for whoever helps.

Law: it holds only what the API answers, so no secret and no row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from datetime import UTC, datetime
from typing import Any

from milvus_cdc.cli import output
from milvus_cdc.control import ControlClient


def add_commands(groups: Any, shared: argparse.ArgumentParser) -> None:
    support = groups.add_parser("support", help="what helps others to help")
    dump = support.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "dump", parents=[shared], help="the state of everything as JSON, without secrets"
    )
    dump.set_defaults(run=run_dump)


async def run_dump(client: ControlClient, args: argparse.Namespace) -> int:
    tasks = await client.list_tasks()
    collections = {
        task.name: [output.to_dict(each) for each in await client.list_collections(task.name)]
        for task in tasks
    }
    state = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": importlib.metadata.version("milvus-cdc"),
        "controllers": [output.to_dict(each) for each in await client.list_controllers()],
        "replicators": [output.to_dict(each) for each in await client.list_replicators()],
        "assignments": [output.to_dict(each) for each in await client.list_assignments()],
        "tasks": [output.to_dict(task) for task in tasks],
        "collections": collections,
    }
    output.show_data(state, "yaml" if args.output == "yaml" else "json")
    return 0
