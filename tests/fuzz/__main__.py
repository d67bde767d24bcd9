"""Mutated inputs for everything that takes bytes of others; the first finding ends it.

python -m tests.fuzz [--target NAME] [--inputs N] [--seed N]
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
from types import FrameType

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import Target, targets

MEMORY_BYTES = 2 * 2**30
"""For the whole process: a length that is believed does not fit."""
CPU_SECONDS = 20
"""For so many inputs: a thousand times what they take."""
AT_ONCE = 50


class TooLong(BaseException):
    """No error of ours can catch it."""


class Finding(Exception):
    def __init__(self, name: str, data: bytes, error: BaseException) -> None:
        super().__init__(f"{name}: {type(error).__name__}: {error}\ninput: {data!r}")


def _late(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"more than {CPU_SECONDS} s of CPU")


def attempt(name: str, target: Target, data: bytes) -> bool:
    """Whether it was taken. Raises Finding."""
    try:
        target.take(data)
    except target.allowed:
        return False
    except (Exception, TooLong, RecursionError, MemoryError) as error:
        raise Finding(name, data, error) from error
    return True


def run(name: str, inputs: int, seed: int) -> tuple[int, float]:
    """How many were taken, and seconds. Raises Finding."""
    target, taken, began = targets()[name], 0, time.perf_counter()
    source = mutated(target.samples, seed, text=target.text)
    before = signal.signal(signal.SIGVTALRM, _late)
    try:
        for done in range(inputs):
            if done % AT_ONCE == 0:
                signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
            taken += attempt(name, target, next(source))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return taken, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(targets()), default=[])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="each; default: 1 million")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for name in arguments.target or targets():
        try:
            taken, seconds = run(name, arguments.inputs, arguments.seed)
        except Finding as finding:
            print(finding, file=sys.stderr)
            return 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        rate = arguments.inputs / max(seconds, 1e-9)
        print(
            f"{name}: {arguments.inputs:,} inputs, {taken:,} taken, "
            f"{rate:,.0f} a second, at most {peak} MiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
