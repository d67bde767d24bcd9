"""`milvus-cdc verify`: the comparison as it runs, and its verdict as the exit code."""

from __future__ import annotations

import argparse
import sys

from milvuscdc.v1 import verify_pb2

from milvus_cdc.cli.output import difference_text, result_text, show_event, to_dict
from milvus_cdc.control import ControlClient

EQUAL, DIFFERENT, NO_VERDICT = 0, 1, 3


async def verify(client: ControlClient, args: argparse.Namespace) -> int:
    live = sys.stderr.isatty()
    code = NO_VERDICT
    async for event in client.verify_task(
        args.name, collections=args.collection, max_differences=args.max_differences
    ):
        kind = event.WhichOneof("event")
        if kind == "verdict":
            code = EQUAL if event.verdict.equal else DIFFERENT
        if args.output != "table":
            show_event(to_dict(event), args.output)
            continue
        if kind == "progress":
            if live:
                sys.stderr.write(f"\r\x1b[K{_progress_text(event.progress)}")
                sys.stderr.flush()
            continue
        if live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        if kind == "difference":
            print(difference_text(event.difference), flush=True)
        elif kind == "collection":
            print(result_text(event.collection), flush=True)
        elif kind == "verdict":
            print(_verdict_text(event.verdict), flush=True)
    if code == NO_VERDICT:
        print("error: the comparison ended without a verdict", file=sys.stderr)
        print("hint: run it again; the controller's log says why it ended", file=sys.stderr)
    return code


def _progress_text(progress: verify_pb2.VerifyProgress) -> str:
    if not progress.collection:
        return "waiting for the sink to pass the source's time at the start"
    phase = "rechecking" if progress.phase == "RECHECKING" else "comparing"
    rows = f"{progress.rows_compared:,}"
    if progress.rows_total:
        share = min(100.0, 100.0 * progress.rows_compared / progress.rows_total)
        rows += f" of {progress.rows_total:,} rows ({share:.0f} %)"
    return f"{phase} {progress.collection}: {rows}"


def _verdict_text(verdict: verify_pb2.VerifyVerdict) -> str:
    word = "EQUAL" if verdict.equal else "DIFFERENT"
    return (
        f"{word}: {verdict.collections_equal} of {verdict.collections} collections equal,"
        f" {verdict.rows_compared:,} rows compared field by field"
    )
