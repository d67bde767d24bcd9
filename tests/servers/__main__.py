"""`python -m tests.servers up --dir D`: a stack of real servers until TERM or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

from tests.servers.stack import Stack


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start etcd, a source and a sink Milvus")
    up.add_argument("--dir", type=Path, required=True, help="data, logs and addresses.json go here")
    up.add_argument("--mq", choices=("natsmq", "kafka"), default="natsmq")
    options = parser.parse_args()

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    folder: Path = options.dir.absolute()
    with Stack(folder, mq=options.mq) as stack:
        text = json.dumps(stack.addresses(), indent=2)
        published = folder / "addresses.json"
        partial = folder / "addresses.json.partial"
        partial.write_text(text + "\n")
        partial.rename(published)
        print(text, flush=True)
        try:
            while not stopping.wait(1):
                for server in stack.servers:
                    if not server.running:
                        print(
                            f"{server.name} ended with code {server.returncode};"
                            f" see {server.log_path}",
                            file=sys.stderr,
                        )
                        return 1
        finally:
            published.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
