"""The command `milvus-cdc-controller`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import structlog
from milvus_cdc import logs
from milvus_cdc.errors import CdcError

from milvus_cdc_controller.config import Config, load
from milvus_cdc_controller.server import Elected, serve
from milvus_cdc_controller.store.sqlite import SqliteStore

log = structlog.get_logger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 after SIGTERM or SIGINT, 2 for what the user must mend, 1 for everything
    else.
    """
    parser = argparse.ArgumentParser(
        prog="milvus-cdc-controller", description="Owns tasks, epochs and checkpoints."
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("--version", action="version", version=version("milvus-cdc"))
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config)
    except CdcError as error:
        print(f"milvus-cdc-controller: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log.format, config.log.level)
    try:
        return asyncio.run(_run(config))
    except CdcError as error:
        log.error("controller cannot start", reason=error.reason, field=error.field)
        print(f"milvus-cdc-controller: {error}", file=sys.stderr)
        return 2


async def _run(config: Config) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if config.store.etcd is not None:
        return 0 if await Elected(config).run(stop) else 1
    assert config.store.sqlite is not None
    return await _lead_alone(config, config.store.sqlite.path, stop)


async def _lead_alone(config: Config, path: Path, stop: asyncio.Event) -> int:
    store = await SqliteStore.open(path)
    stopping = asyncio.create_task(stop.wait())
    try:
        async with serve(config, store) as running:
            await asyncio.wait({stopping, running.done}, return_when=asyncio.FIRST_COMPLETED)
            if running.done.done():
                log.critical("controller ends: its loop broke", exc_info=running.done.exception())
                return 1
            log.info("controller stops")
    finally:
        stopping.cancel()
        await store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
