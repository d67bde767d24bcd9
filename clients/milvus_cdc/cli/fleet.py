"""Commands about replicators and what they hold: shown, marked, drained, moved."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from milvuscdc.v1 import fleet_service_pb2 as pb

from milvus_cdc.cli import output
from milvus_cdc.control import ControlClient
from milvus_cdc.control.names import assignment_name, replicator_name

NOT_DONE = 1
MOVE_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_MOVE_HEAD = ("COLLECTION", "TASK", "FROM", "TO", "LOAD", "ASSIGNMENT")
_LOAD_HEAD = ("REPLICATOR", "LOAD BEFORE", "AFTER")


def add_commands(groups: Any, shared: argparse.ArgumentParser) -> None:
    parser = groups.add_parser("replicator", help="show, mark and drain replicators")
    _replicator_commands(parser.add_subparsers(metavar="COMMAND", required=True), shared)
    parser = groups.add_parser("assignment", help="show and move what replicators hold")
    _assignment_commands(parser.add_subparsers(metavar="COMMAND", required=True), shared)


def _replicator_commands(parsers: Any, shared: argparse.ArgumentParser) -> None:
    def add(name: str, run: Any, text: str, *, named: bool = True) -> Any:
        parser = parsers.add_parser(name, parents=[shared], help=text)
        parser.set_defaults(run=run)
        if named:
            parser.add_argument("name", metavar="REPLICATOR")
        return parser

    add("list", list_replicators, "who is there, in which state and why", named=False)
    watching = add("watch", watch, "follow changes until interrupted", named=False)
    watching.add_argument("name", nargs="?", default="", metavar="REPLICATOR")
    cordoning = add("cordon", cordon, "give it nothing new; what it holds stays")
    cordoning.add_argument("--validate-only", action="store_true", help="check, change nothing")
    uncordoning = add("uncordon", uncordon, "let it have work again; ends a drain, too")
    uncordoning.add_argument("--validate-only", action="store_true", help="check, change nothing")
    draining = add("drain", drain, "cordon it and move all that it holds to others")
    draining.add_argument(
        "--within",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="give up after it; what has not moved stays. Default: no end",
    )
    draining.add_argument(
        "--force", action="store_true", help="even if something stops because nobody takes it"
    )
    draining.add_argument("--no-wait", action="store_true", help="do not wait until it is done")
    draining.add_argument("--cancel", action="store_true", help="end a drain that is under way")
    draining.add_argument("--validate-only", action="store_true", help="check, change nothing")


def _assignment_commands(parsers: Any, shared: argparse.ArgumentParser) -> None:
    listing = parsers.add_parser("list", parents=[shared], help="who holds what")
    listing.add_argument("--task", default="", metavar="NAME")
    listing.add_argument("--replicator", default="", metavar="REPLICATOR")
    listing.set_defaults(run=list_assignments)
    moving = parsers.add_parser("move", parents=[shared], help="to a certain replicator")
    moving.add_argument("name", metavar="ASSIGNMENT")
    moving.add_argument("--to", required=True, metavar="REPLICATOR")
    moving.add_argument("--no-wait", action="store_true", help="do not wait until it is there")
    moving.add_argument("--validate-only", action="store_true", help="check, change nothing")
    moving.set_defaults(run=move)
    evening = parsers.add_parser(
        "rebalance", parents=[shared], help="even out the load with few moves"
    )
    evening.add_argument("--dry-run", action="store_true", help="show the moves, do none")
    evening.add_argument("--max-moves", type=int, default=0, metavar="N", help="default: all")
    evening.set_defaults(run=rebalance)


async def list_replicators(client: ControlClient, args: argparse.Namespace) -> int:
    _show_replicators(await client.list_replicators(), args.output)
    return 0


async def list_assignments(client: ControlClient, args: argparse.Namespace) -> int:
    replicator = replicator_name(args.replicator) if args.replicator else ""
    found = await client.list_assignments(task=args.task, replicator=replicator)
    output.show_list(
        "assignments", found, args.output, output.ASSIGNMENT_HEAD, output.assignment_line
    )
    return 0


async def watch(client: ControlClient, args: argparse.Namespace) -> int:
    kinds = pb.WatchReplicatorsResponse.Type
    async for event in client.watch_replicators(args.name):
        if args.output != "table":
            output.show_event(output.to_dict(event), args.output)
        elif event.type != pb.WatchReplicatorsResponse.TYPE_BOOKMARK:
            what = kinds.Name(event.type).removeprefix("TYPE_").lower()
            line = output.replicator_line(event.replicator)
            print("  ".join([f"{what:<8}", *filter(None, line)]), flush=True)
    return 0


async def cordon(client: ControlClient, args: argparse.Namespace) -> int:
    marked = await client.cordon_replicator(args.name, validate_only=args.validate_only)
    _show_replicators([marked], args.output)
    return 0


async def uncordon(client: ControlClient, args: argparse.Namespace) -> int:
    marked = await client.uncordon_replicator(args.name, validate_only=args.validate_only)
    _show_replicators([marked], args.output)
    return 0


async def drain(client: ControlClient, args: argparse.Namespace) -> int:
    """0 when it holds nothing any more, `NOT_DONE` when the drain ended before."""
    if args.cancel:
        _show_replicators([await client.cancel_drain(args.name)], args.output)
        return 0
    replicator = await client.drain_replicator(
        args.name,
        within_seconds=args.within,
        force=args.force,
        validate_only=args.validate_only,
    )
    if args.validate_only or args.no_wait:
        _show_replicators([replicator], args.output)
        return 0
    said = -1
    async for event in client.watch_replicators(args.name):
        if event.type == pb.WatchReplicatorsResponse.TYPE_BOOKMARK:
            continue
        replicator = event.replicator
        state = replicator.drain.state
        if state == pb.Drain.STATE_RUNNING:
            if replicator.drain.left != said:
                said = replicator.drain.left
                # Answers of programs stay whole.
                print(f"{said} of {replicator.drain.total} left", file=sys.stderr, flush=True)
            continue
        _show_replicators([replicator], args.output)
        if state == pb.Drain.STATE_DONE:
            return 0
        word = pb.Drain.State.Name(state).removeprefix("STATE_").lower()
        what = "was ended" if state == pb.Drain.STATE_UNSPECIFIED else f"is {word}"
        print(
            f"error: the drain {what}; {replicator.drain.left} stay with it\n"
            "hint: `milvus-cdc assignment list` shows what; drain it again, or uncordon it",
            file=sys.stderr,
        )
        return NOT_DONE
    raise AssertionError("a watch does not end by itself")


async def move(client: ControlClient, args: argparse.Namespace) -> int:
    """0 when it is there, `NOT_DONE` when it went elsewhere or is not there in time."""
    target = replicator_name(args.to)
    before = await client.move_assignment(args.name, target, validate_only=args.validate_only)
    if args.validate_only or args.no_wait or before.replicator == target:
        _show_assignments([before], args.output)
        return 0
    name = assignment_name(args.name)
    until = asyncio.get_running_loop().time() + MOVE_SECONDS
    now = before
    while asyncio.get_running_loop().time() < until:
        found = {a.name: a for a in await client.list_assignments(task=before.task)}
        if name not in found:
            break
        now = found[name]
        if now.state == "ACCEPTED" and (now.epoch > before.epoch or not now.moving_reason):
            break
        await asyncio.sleep(_LOOK_SECONDS)
    _show_assignments([now], args.output)
    if now.replicator == target and now.state == "ACCEPTED":
        return 0
    print(
        f"error: {name} is not at {target}\n"
        "hint: `milvus-cdc assignment list` shows where it is; `milvus-cdc replicator list` why",
        file=sys.stderr,
    )
    return NOT_DONE


async def rebalance(client: ControlClient, args: argparse.Namespace) -> int:
    plan = await client.rebalance(max_moves=args.max_moves, validate_only=args.dry_run)
    if args.output != "table":
        output.show_data(output.to_dict(plan), args.output)
        return 0
    if plan.moves:
        output.show_table(_MOVE_HEAD, [_move_line(each) for each in plan.moves])
    else:
        print("nothing to move")
    output.show_table(
        _LOAD_HEAD,
        [
            (_short(load.replicator), f"{load.before:.1f}", f"{load.after:.1f}")
            for load in plan.loads
        ],
    )
    return 0


def _move_line(item: pb.RebalancePlan.Move) -> output.Line:
    return (
        item.collection,
        _short(item.task),
        _short(getattr(item, "from")),
        _short(item.to),
        f"{item.load:.1f}",
        _short(item.assignment),
    )


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _show_replicators(found: Sequence[pb.Replicator], form: str) -> None:
    output.show_list("replicators", found, form, output.REPLICATOR_HEAD, output.replicator_line)


def _show_assignments(found: Sequence[pb.AssignmentInfo], form: str) -> None:
    output.show_list("assignments", found, form, output.ASSIGNMENT_HEAD, output.assignment_line)
