"""Writes rows exactly once until it is killed: from where the sink says that it was."""

from __future__ import annotations

import asyncio
import sys

from milvus_cdc import logs
from milvus_cdc.errors import RetryableError
from milvus_cdc.sink.writer import Opening

from tests.contract.kafka_samples import BEGIN, batch, table_named, upserts, writer_for

KEYS = 5


async def main(brokers: str, collection: str, epoch: int, last: int) -> None:
    sink = writer_for(brokers, exactly_once=True)
    table = table_named(collection)
    opening = Opening.NEW if epoch == 1 else Opening.RESUME
    opened = await sink.open(table, opening, epoch)
    done = max((each.resolved_ts - BEGIN for each in opened.checkpoints), default=0)
    print(f"open {done}", flush=True)
    while done < last:
        rows = [upserts(ts, *[(k, ts) for k in range(KEYS)]) for ts in range(done + 1, done + 4)]
        try:
            await sink.write(table, batch(*rows, upto=done + 3), 8.0)
        except RetryableError as error:
            print(error.reason, flush=True)
            if error.reason == "SINK_FENCED":
                break
            continue
        done += 3
        print(done, flush=True)
    await sink.close()


if __name__ == "__main__":
    logs.configure(level="warning")
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
