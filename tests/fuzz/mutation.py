"""Recorded inputs, changed: the same seed gives the same inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

_LENGTHS = (
    b"\x00",
    b"\x7f",
    b"\x80\x01",
    b"\xff\xff\x03",
    b"\xff\xff\xff\xff\x07",  # 2 GiB - 1
    b"\xff\xff\xff\xff\x0f",  # 4 GiB - 1
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # -1
    b"\xff" * 12,
)
_WORDS = (
    b"null", b"[]", b"{}", b"!!python/object:os.system", b"&a", b"*a", b"<<: *a", b"[" * 40,
    b"{a: " * 40, b"1e999", b"-1", b"999999999999999999999999", b".nan", b"\t", b"\n  ", b": ",
    b"- ", b"'", b'"', b"#", b"|", b"true", b"0x7f", b"2026-01-01", b"\xff", b"\xef\xbb\xbf",
    b"\x00",    b"\xed\xa0\x80", b"1_0", b"0o8", b"~", b"? ", b"=", b"---\n", b'"\\ud800"',
)  # fmt: skip


def mutated(
    samples: Sequence[bytes], seed: int, *, text: bool = False, max_bytes: int = 65_536
) -> Iterator[bytes]:
    """Without end."""
    rng = random.Random(seed)
    words = _WORDS if text else _LENGTHS
    ways: tuple[Callable[[random.Random, bytearray], None], ...] = (
        _flip, _flip, _set, _cut_out, _double, _cut_off, _swap,
    )  # fmt: skip
    while True:
        data = bytearray(rng.choice(samples))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            way = rng.randrange(len(ways) + 3)
            if way < len(ways):
                if data:
                    ways[way](rng, data)
            elif way == len(ways):
                other = rng.choice(samples)
                at, start = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
                data[at:] = other[start:]
            else:
                at = rng.randrange(len(data) + 1)
                data[at : at + rng.choice((0, 0, 1, 2, 5))] = rng.choice(words)
        yield bytes(data[:max_bytes])


def _flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut_out(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 4, 16, 64))]


def _double(rng: random.Random, data: bytearray) -> None:
    at, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 32, 256))
    data[at:at] = data[at : at + size] * rng.choice((1, 1, 2, 50))


def _cut_off(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _swap(rng: random.Random, data: bytearray) -> None:
    one, other = rng.randrange(len(data)), rng.randrange(len(data))
    data[one], data[other] = data[other], data[one]
