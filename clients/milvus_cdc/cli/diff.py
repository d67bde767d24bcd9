"""`milvus-cdc task diff`: what differs at the sink, rows aside; the verdict is the exit code."""

from __future__ import annotations

import argparse
import sys

from milvuscdc.v1 import diff_pb2

from milvus_cdc.cli.output import show_event, show_table, to_dict
from milvus_cdc.control import ControlClient

SAME, DIFFERENT, NO_VERDICT = 0, 1, 3
HEAD = ("ACTION", "KIND", "COLLECTION", "NAME", "DETAIL")


async def diff(client: ControlClient, args: argparse.Namespace) -> int:
    code = NO_VERDICT
    found: list[diff_pb2.ObjectDifference] = []
    verdict = diff_pb2.DiffVerdict()
    async for event in client.diff_task(args.name, collections=args.collection):
        kind = event.WhichOneof("event")
        if kind == "verdict":
            verdict = event.verdict
            code = DIFFERENT if verdict.differences else SAME
        if args.output != "table":
            show_event(to_dict(event), args.output)
        elif kind == "difference":
            found.append(event.difference)
    if code == NO_VERDICT:
        print("error: the comparison ended without a verdict", file=sys.stderr)
        print("hint: run it again; the controller's log says why it ended", file=sys.stderr)
    elif args.output == "table":
        if found:
            show_table(HEAD, [_line(each) for each in sorted(found, key=_place)])
        count = f"{verdict.differences} differences" if found else "no difference"
        print(f"{count}, {verdict.collections} collections looked at", flush=True)
    return code


def _place(each: diff_pb2.ObjectDifference) -> tuple[str, str]:
    return each.database, each.collection


def _line(each: diff_pb2.ObjectDifference) -> tuple[str, ...]:
    action = diff_pb2.ObjectDifference.Action.Name(each.action).removeprefix("ACTION_").lower()
    place = ".".join(filter(None, (each.database, each.collection)))
    return action, each.kind, place, each.name, each.detail
