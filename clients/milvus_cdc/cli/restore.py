"""`milvus-cdc restore`: a collection from the file sink's files into a Milvus."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from milvus_cdc.cli import output
from milvus_cdc.cli.positions import parse_time
from milvus_cdc.cli.sink import milvus_of, token_of
from milvus_cdc.cli.task_file import InputError
from milvus_cdc.control import ControlClient
from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.model import tso_to_text
from milvus_cdc.sink.files.opening import open_store
from milvus_cdc.sink.files.reading import (
    NEWEST,
    CollectionFiles,
    History,
    find_collections,
    time_to_ts,
)
from milvus_cdc.sink.files.restoring import Progress
from milvus_cdc.sink.files.restoring import restore as restore_rows
from milvus_cdc.sink.milvus import MilvusSink

_REFUSED, _UNREACHABLE = 3, 4
_PROGRESS_SECONDS = 2.0
_ADVICE = {
    "COLLECTION_EXISTS": "--to names another collection; --into-existing puts the rows beside its",
    "COLLECTION_DROPPED": "--at TIME names a time before",
    "NOT_COMPLETE": "--at TIME names an earlier time; without it, all that is published is taken",
}


async def restore(client: ControlClient, args: argparse.Namespace) -> int:
    """Talks to the store and the Milvus alone. Raises InputError."""
    token_of(args.token_env)
    at = time_to_ts(parse_time(args.at)) if args.at else NEWEST
    try:
        history = await asyncio.to_thread(_history, args, at)
        database, name = _split(args.to) if args.to else history.name
        if args.dry_run:
            return _show(args, history, database, name, None)
        sink = MilvusSink(milvus_of(args))
        try:
            done = await restore_rows(
                history,
                sink,
                database,
                name,
                into_existing=args.into_existing,
                memory_bytes=args.memory_mib * 2**20,
                told=_Teller(),
            )
        finally:
            await sink.close()
    except InputError:
        raise
    except CdcError as error:
        print(f"error: {error.message} ({error.reason})", file=sys.stderr)
        advice = _ADVICE.get(error.reason, "check --from, --uri and the rights of both")
        print(f"hint: {advice}", file=sys.stderr)
        return _UNREACHABLE if isinstance(error, RetryableError) else _REFUSED
    return _show(args, history, database, name, done)


def _history(args: argparse.Namespace, at: int) -> History:
    try:
        # S3 keys come from the environment (AWS_ACCESS_KEY_ID, ...) or the machine's role.
        store = open_store(args.source, endpoint=args.s3_endpoint, region=args.s3_region)
    except UserError as error:
        raise InputError(error.reason, error.message, "see --help for --from") from error
    found = find_collections(store)
    return _choose(found, args).history(at, args.generation)


def _choose(found: list[CollectionFiles], args: argparse.Namespace) -> CollectionFiles:
    named = [
        each
        for each in found
        if (each.head.database or "default", each.head.collection) == _split(args.collection)
        and args.collection_id in (0, each.head.collection_id)
    ]
    there = named if len(named) < 2 else [each for each in named if not each.head.dropped]
    if len(there) == 1:
        return there[0]
    if not named:
        known = ", ".join(sorted({f"{e.head.database}.{e.head.collection}" for e in found}))
        raise InputError(
            "COLLECTION_UNKNOWN",
            f"there are no files of {args.collection} below {args.source}",
            f"there are {known or 'none at all'}",
        )
    ids = ", ".join(
        f"{each.head.collection_id}{' (dropped)' if each.head.dropped else ''}" for each in named
    )
    raise InputError(
        "COLLECTION_AMBIGUOUS",
        f"several collections had the name {args.collection}: {ids}",
        "name one with --collection-id",
    )


def _split(name: str) -> tuple[str, str]:
    database, dot, collection = name.partition(".")
    return (database, collection) if dot else ("default", database)


class _Teller:
    """A line now and then, to people who wait."""

    def __init__(self) -> None:
        self._told = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        last = progress.written == progress.total
        if last or now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            part = 100 * progress.written // max(1, progress.total)
            text = f"{progress.written} of {progress.total} rows ({part} %)"
            print(text, file=sys.stderr, flush=True)


def _show(
    args: argparse.Namespace, history: History, database: str, name: str, done: Progress | None
) -> int:
    until = history.at if history.at != NEWEST else history.complete_ts
    facts = {
        "source": ".".join(history.name),
        "collectionId": str(history.table.collection_id),
        "target": f"{database}.{name}",
        "completeUpTo": tso_to_text(until) if until else "",
        "files": len(history.files),
        "changes": sum(file.entry.rows for file in history.files),
        "rowsWritten": done.written if done else 0,
        "dryRun": done is None,
    }
    if args.output != "table":
        output.show_data(facts, args.output)
    elif done is None:
        print(
            f"{facts['source']} up to {facts['completeUpTo'] or 'no known time'}: "
            f"{facts['changes']} changes in {facts['files']} files; nothing was written"
        )
    else:
        print(
            f"{done.written} rows restored to {facts['target']}; indexes are not in the files: "
            "create them, then load the collection"
        )
    return 0
