"""Some thousand mutated inputs for everything that takes bytes of others, and what they once found.
A million of each: `make fuzz`.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from milvus_cdc import plain_yaml
from milvus_cdc.catalog import Assembly, Layout
from milvus_cdc.cli.position_file import parse_positions
from milvus_cdc.cli.task_file import InputError, parse_task
from milvus_cdc.codec import columns
from milvus_cdc.errors import BugError, UserError
from milvus_cdc_controller import config
from milvus_cdc_replicator import settings

from tests.fuzz.__main__ import Finding, attempt, main, run
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import Target, targets

INPUTS = {"controller file": 150, "replicator file": 200, "task file": 200, "etcd value": 400}


@pytest.mark.parametrize("name", targets())
def test_only_the_documented_errors_come_out(name: str) -> None:
    run(name, INPUTS.get(name, 1500), seed=2)


def test_the_same_seed_gives_the_same_inputs() -> None:
    one, two = (mutated([b"sample" * 9], 5) for _ in range(2))
    assert [next(one) for _ in range(50)] == [next(two) for _ in range(50)]


def test_other_errors_and_too_much_memory_are_findings() -> None:
    def believe(data: bytes) -> bytes:
        return bytes(2**40)

    for take in (believe, lambda data: data[7]):
        with pytest.raises(Finding, match="input: b'abc'"):
            attempt("x", Target([b"abc"], take, (BugError,)), b"abc")


def test_a_length_that_is_no_length_takes_no_memory(tmp_path: Path) -> None:
    """In a process that may not have more than 2 GiB, as `make fuzz` runs."""
    code = "from tests.fuzz.__main__ import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "--inputs", "2000", "--target", "log entry"]
    done = subprocess.run(
        [*command, "--target", "column", "--target", "wire format"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2,000 inputs") == 3
    assert callable(main)
    assert resource.RLIMIT_AS
    for size in (b"\xff\xff\xff\xff\x07", b"\xff" * 9 + b"\x01"):
        with pytest.raises(BugError):
            columns.parse(b"\x1a" + size + b"short")


# ---- what was found


def bad_files() -> Iterator[tuple[str, bytes, str]]:
    yield "a byte that is no UTF-8", b"listen: \xe4", "UTF-8"
    yield "a character that YAML has not", b"name: a\x7fb", "not allowed"
    yield "NUL", b"a: b\0", "not allowed"
    yield "deep", b"a: " + b"[" * 5000, "too deep"
    yield "closed and deep", b"a: " + b"[" * 200 + b"]" * 200, "too deep"
    yield "a date that is none", b"!!timestamp 2026-13-45", "value"
    yield "a number too long", b"a: " + b"9" * 5000, "value cannot be read"
    yield "itself", b"a: &a [*a]", "alias within itself"
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
    )
    yield "a bomb", bomb.encode(), "unfolded"


@pytest.mark.parametrize(("content", "says"), [(c, s) for _, c, s in bad_files()])
def test_files_that_are_no_yaml(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(plain_yaml.BadYamlError, match=says):
        plain_yaml.load_file(path)
    for load in (config.load, settings.load):
        with pytest.raises(UserError) as failed:
            load(path)
        assert failed.value.reason in ("CONFIG_INVALID", "CONFIG_UNREADABLE")
    text = content.decode("utf-8", "surrogateescape")
    with pytest.raises(InputError):
        parse_task(text)
    with pytest.raises(InputError):
        parse_positions(text)


def test_a_position_file_nested_too_deeply() -> None:
    with pytest.raises(InputError, match="too deeply"):
        parse_positions("[" * 100_000)


def test_keys_of_a_source_with_numbers_that_are_none() -> None:
    assembly = Assembly(Layout("by-dev"))
    for key in (
        f"root-coord/fields/{'4' * 13_000}/100",
        f"snapshots/root-coord/collection/1_ts{'7' * 5000}",
        "snapshots/" * 5000 + "root-coord/collection/1_ts7",
    ):
        assembly.apply(f"by-dev/meta/{key}", b"x")
    assert assembly.catalogue(1, 1).collections == ()
