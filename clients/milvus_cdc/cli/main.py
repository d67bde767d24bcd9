"""The `milvus-cdc` command: arguments, errors as two lines, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import grpc
from milvuscdc.v1 import task_pb2

from milvus_cdc import logs
from milvus_cdc.cli import access, commands, fleet, holds, support
from milvus_cdc.cli.diff import diff
from milvus_cdc.cli.positions import positions, set_positions
from milvus_cdc.cli.sink import create_user, milvus_options
from milvus_cdc.cli.task_file import InputError
from milvus_cdc.cli.verify import verify
from milvus_cdc.control import DEFAULT_ADDRESS, ApiError, ControlClient
from milvus_cdc.errors import UserError

Command = Callable[[ControlClient, argparse.Namespace], Awaitable[int]]

OK, USAGE, REFUSED, UNREACHABLE, INTERRUPTED = 0, 2, 3, 4, 130
_EPILOG = """\
exit codes:
  0  done (verify: everything was compared and is equal; task diff: no difference)
  1  verify: something differs or could not be compared; task diff: differences;
     replicator drain, assignment move: it ended before it was done
  2  wrong arguments or input; nothing was sent or stored
  3  the controller refused
  4  the controller could not be reached in time

NAME is a task's name, with or without `tasks/` before it; REPLICATOR and ASSIGNMENT likewise.
The controller's address comes from --controller, else MILVUS_CDC_CONTROLLER, else %s.
Instead of --tls, --ca-file, --certificate-file, --key-file, --server-name, --token-file and
--insecure there are MILVUS_CDC_TLS=true, MILVUS_CDC_CA_FILE and so on; MILVUS_CDC_TOKEN is a token.
"""
_ADVICE = {
    grpc.StatusCode.NOT_FOUND: "`milvus-cdc task list` shows what there is",
    grpc.StatusCode.ALREADY_EXISTS: "choose another name, or update the task that is there",
    grpc.StatusCode.INVALID_ARGUMENT: "correct the field and try again",
    grpc.StatusCode.ABORTED: "it changed meanwhile: get it again, then repeat",
    grpc.StatusCode.FAILED_PRECONDITION: "`milvus-cdc task get NAME` shows its state",
    grpc.StatusCode.UNAVAILABLE: "try again in a moment",
    grpc.StatusCode.DEADLINE_EXCEEDED: "raise --timeout and try again",
    grpc.StatusCode.OUT_OF_RANGE: "begin the watch anew",
    grpc.StatusCode.UNAUTHENTICATED: (
        "say who you are with --token-file, or --certificate-file and --key-file"
    ),
    grpc.StatusCode.PERMISSION_DENIED: "ask somebody who has such a role, or for the role",
    grpc.StatusCode.UNIMPLEMENTED: "this address serves another version, or is no controller",
}
_ADVICE_BY_REASON = {
    "NO_LEADER": "`milvus-cdc controller list` shows which run; try again in a few seconds",
    "TASK_NOT_PAUSED": "milvus-cdc task pause NAME; set the positions; milvus-cdc task resume NAME",
    "REPLICATOR_NOT_FOUND": "`milvus-cdc replicator list` shows what there is",
    "HOLD_NOT_FOUND": "`milvus-cdc hold list --task NAME` shows what there is",
    "HOLD_IN_USE": "`milvus-cdc hold list` shows for which tasks",
    "HOLD_RELEASING": "wait, or add --forget if its queue is gone for good",
    "ASSIGNMENT_NOT_FOUND": "`milvus-cdc assignment list` shows what there is",
    "NO_OTHER_REPLICATOR": "start another replicator, or stop what it holds with --force",
    "NO_CAPACITY": "start another replicator, or stop what it holds with --force",
    "NO_REPLICATOR": "start a replicator: milvus-cdc-replicator --config replicator.yaml",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        print(f"hint: {self.prog} --help shows what it takes", file=sys.stderr)
        raise SystemExit(USAGE)


def _shared() -> _Parser:
    """Options that may stand before or after the command."""
    shared = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--controller", metavar="ADDR", help="host:port of the controller")
    shared.add_argument("-o", "--output", choices=("table", "json", "yaml"), help="default: table")
    access.add_options(shared)
    shared.add_argument("--timeout", type=float, metavar="SECONDS", help="per call; default: 30")
    return shared


def build_parser() -> _Parser:
    shared = _shared()
    parser = _Parser(
        prog="milvus-cdc",
        description="Replicates Milvus collections and proves them equal.",
        epilog=_EPILOG % DEFAULT_ADDRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    task = groups.add_parser("task", help="create, watch and change tasks")
    _task_commands(task.add_subparsers(metavar="COMMAND", required=True), shared)

    check = groups.add_parser("verify", parents=[shared], help="compare source and sink row by row")
    check.add_argument("name", metavar="NAME")
    check.add_argument(
        "--collection", action="append", default=[], metavar="DB.NAME", help="only this; repeatable"
    )
    check.add_argument(
        "--max-differences", type=int, default=0, metavar="N", help="keys to name per kind; 10"
    )
    check.set_defaults(run=verify)

    controller = groups.add_parser("controller", help="the controllers")
    listing = controller.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "list", parents=[shared], help="which run, and which of them leads"
    )
    listing.set_defaults(run=commands.controllers)

    fleet.add_commands(groups, shared)
    holds.add_commands(groups, shared)
    support.add_commands(groups, shared)

    sink = groups.add_parser("sink", help="what a person has to do at a sink")
    user = sink.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "create-user", parents=[shared], help="create a user that CREDENTIAL_NEEDED names"
    )
    milvus_options(user)
    user.add_argument("--user", required=True, metavar="NAME")
    user.add_argument(
        "--password-file", default="", metavar="FILE", help="instead of asking; - for stdin"
    )
    user.set_defaults(run=create_user)

    _restore_command(groups, shared)
    groups.add_parser("version", parents=[shared], help="print the version").set_defaults(run=None)
    return parser


def _restore_command(
    groups: argparse._SubParsersAction[_Parser],
    shared: _Parser,
) -> None:
    parser = groups.add_parser(
        "restore",
        parents=[shared],
        help="rebuild a collection in a Milvus from files of a sink",
    )
    parser.set_defaults(run=_restore)
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="URI",
        help="file:///folder or s3://bucket/prefix, as in the task; keys from AWS_* variables",
    )
    parser.add_argument(
        "--collection", required=True, metavar="DB.NAME", help="its last name in the files"
    )
    milvus_options(parser)
    parser.add_argument("--to", default="", metavar="DB.NAME", help="default: the same name")
    parser.add_argument(
        "--at", default="", metavar="TIME", help="like 2026-11-21T09:30:00Z; default: the newest"
    )
    parser.add_argument(
        "--collection-id", type=int, default=0, metavar="N", help="one of several of that name"
    )
    parser.add_argument(
        "--generation",
        type=int,
        default=0,
        metavar="N",
        help="before a resync; default: newest",
    )
    parser.add_argument(
        "--into-existing", action="store_true", help="upsert into a collection that holds rows"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is, write nothing")
    parser.add_argument("--memory-mib", type=int, default=512, metavar="N", help="for keys; 512")
    parser.add_argument("--s3-endpoint", default="", metavar="URL", help="AWS when not given")
    parser.add_argument("--s3-region", default="", metavar="NAME")


def _task_commands(
    parsers: argparse._SubParsersAction[_Parser],
    shared: _Parser,
) -> None:
    def add(name: str, run: Command, help_text: str, *, named: bool = True) -> _Parser:
        parser = parsers.add_parser(name, parents=[shared], help=help_text)
        parser.set_defaults(run=run)
        if named:
            parser.add_argument("name", metavar="NAME")
        return parser

    create = add("create", commands.create, "create a task from a file", named=False)
    create.add_argument("-f", "--file", required=True, help="YAML or JSON; - for stdin")
    create.add_argument("--validate-only", action="store_true", help="check all, store nothing")
    create.add_argument("--request-id", default="", metavar="UUID", help="repeat safely with it")

    listing = add("list", commands.list_tasks, "list tasks", named=False)
    states = [s.removeprefix("TASK_STATE_").lower() for s in task_pb2.TaskState.keys()[1:]]
    listing.add_argument(
        "--state", action="append", default=[], type=str.lower, choices=states, help="repeatable"
    )
    listing.add_argument("--label", action="append", default=[], metavar="K=V", help="repeatable")

    add("get", commands.get, "show one task")
    watch = add("watch", commands.watch, "follow changes until interrupted", named=False)
    watch.add_argument("name", nargs="?", metavar="NAME")

    update = add("update", commands.update, "change selection, labels, carry or drift")
    update.add_argument("-f", "--file", default="", help="the fields to change; - for stdin")
    for option, text in (
        ("--include", "replaces the included globs; repeatable"),
        ("--exclude", "replaces the excluded globs; repeatable"),
    ):
        update.add_argument(option, action="append", default=[], metavar="GLOB", help=text)
    update.add_argument(
        "--carry",
        action="append",
        default=[],
        metavar="KIND=true|false",
        help="carry rows, schema, index, load, rbac, flush or not; repeatable",
    )
    update.add_argument(
        "--drift", type=str.lower, choices=("repair", "report"), help="what others change there"
    )
    update.add_argument("--no-exclude", action="store_true", help="exclude nothing any more")
    update.add_argument("--label", action="append", default=[], metavar="K=V", help="set a label")
    update.add_argument("--no-label", action="append", default=[], metavar="K", help="remove one")
    update.add_argument("--validate-only", action="store_true", help="check, store nothing")

    differ = add("diff", diff, "what the sink lacks or has too much, rows aside")
    differ.add_argument(
        "--collection", action="append", default=[], metavar="DB.NAME", help="only this; repeatable"
    )
    add("pause", commands.pause, "stop reading and writing, keep the place")
    add("resume", commands.resume, "go on after a pause")
    delete = add("delete", commands.delete, "forget a task; the sink keeps its rows")
    delete.add_argument("--allow-missing", action="store_true", help="succeed when it is not there")
    retry = add("retry", commands.retry, "let what FAILED go on from its checkpoint")
    retry.add_argument("--collection", default="", metavar="DB.NAME", help="only this")
    resync = add("resync", commands.resync, "drop a collection at the sink and fill it again")
    resync.add_argument("--collection", required=True, metavar="DB.NAME")
    resync.add_argument("--yes", action="store_true", help="do not ask")
    add("positions", positions, "where each vchannel stands in the log, and how long it is kept")
    setting = add("set-positions", set_positions, "put a paused task elsewhere in the log")
    where = setting.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--from-file",
        metavar="FILE",
        default="",
        help="of `positions -o json`, milvus-backup or milvus-cdc; - for stdin",
    )
    where.add_argument("--at", metavar="TIME", default="", help="like 2026-11-21T09:30:00Z")
    setting.add_argument(
        "--collection", action="append", default=[], metavar="DB.NAME", help="only this; with --at"
    )
    setting.add_argument("--dry-run", action="store_true", help="check all, set nothing")
    shown = add("collections", commands.collections, "state, lag and rows per collection")
    shown.add_argument("--watch", action="store_true", help="again every two seconds")


async def _restore(client: ControlClient, args: argparse.Namespace) -> int:
    # Reading files takes libraries whose loading is half of the start of any command.
    from milvus_cdc.cli.restore import restore

    return await restore(client, args)


def _fail(what: str, advice: str, code: int) -> int:
    print(f"error: {' '.join(what.split())}", file=sys.stderr)
    print(f"hint: {advice}", file=sys.stderr)
    return code


def _api_failure(err: ApiError, address: str, tls: bool) -> int:
    if err.unreachable:
        return _fail(
            f"no answer from a controller at {address}: {err.message}",
            access.advice(err.message, tls)
            or "start it, or say where it is with --controller or MILVUS_CDC_CONTROLLER",
            UNREACHABLE,
        )
    field = f", field {err.field}" if err.field else ""
    advice = _ADVICE.get(err.code, "the controller's log says more")
    if err.code == grpc.StatusCode.FAILED_PRECONDITION and err.field:
        advice = f"check {err.field} and what it points to, then try again"
    advice = _ADVICE_BY_REASON.get(err.reason, advice)
    return _fail(f"{err.message} ({err.code.name}, {err.reason}{field})", advice, REFUSED)


def _input_failure(err: InputError, path: str) -> int:
    place = f"{path or 'input'}:{err.line}: " if err.line else ""
    return _fail(f"{place}{err.message} ({err.reason})", err.advice, USAGE)


async def _run(args: argparse.Namespace) -> int:
    address = getattr(args, "controller", "") or os.environ.get("MILVUS_CDC_CONTROLLER", "")
    address = address or DEFAULT_ADDRESS
    args.output = getattr(args, "output", "table")
    timeout = getattr(args, "timeout", 30.0)
    if timeout <= 0:
        return _fail("--timeout must be positive", "give seconds, for example 30", USAGE)
    try:
        credentials, tls = access.credentials(args, os.environ)
        line = ControlClient(address, timeout_seconds=timeout, credentials=credentials)
    except UserError as err:
        return _fail(f"{err.message} ({err.reason})", "see docs/security.md", USAGE)
    async with line as client:
        try:
            code: int = await args.run(client, args)
        except ApiError as err:
            return _api_failure(err, address, tls)
        except InputError as err:
            path = getattr(args, "file", "")
            return _input_failure(err, "stdin" if path == "-" else path)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; see the help text."""
    args = build_parser().parse_args(argv)
    if args.run is None:
        print(importlib.metadata.version("milvus-cdc"))
        return OK
    if argv is None:  # else the process, and how it logs, is somebody else's
        logs.configure(level="warning")
    try:
        return asyncio.run(_run(args))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


if __name__ == "__main__":
    raise SystemExit(main())
