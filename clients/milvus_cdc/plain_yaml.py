"""YAML of people, read with bounds: what is too deep, refers to itself or unfolds to far more than
was written is an error with its line, like anything else that is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 4 * 2**20
MAX_VALUES = 200_000
"""Aliases counted as often as they are used."""
MAX_DEPTH = 100


class BadYamlError(Exception):
    """`line` counts from 1, 0 when unknown."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


class Loader(yaml.SafeLoader):
    """Safe YAML without dates: a time is a string, as in JSON. Depth is bounded while it is read:
    the time for it grows with its square.
    """

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise self._too_deep()
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) >= MAX_DEPTH:
            raise self._too_deep()
        return bool(super().add_indent(column))

    def _too_deep(self) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def compose(text: str) -> tuple[yaml.Node | None, Loader]:
    """The only document, None when it is empty, and what makes values of it; the caller disposes of
    that. Raises BadYamlError.
    """
    if len(text) > MAX_BYTES:
        raise BadYamlError(f"more than {MAX_BYTES // 2**20} MiB")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _measure(node, {}, 0)
    except yaml.YAMLError as error:
        raise _bad(error) from error
    except RecursionError as error:
        raise BadYamlError("nested too deeply") from error
    return node, loader


def construct(node: yaml.Node, loader: Loader) -> Any:
    """Raises BadYamlError."""
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _bad(error) from error
    except (ValueError, TypeError, OverflowError) as error:
        # Of the constructors for numbers: `0x`, a number of ten thousand digits, ...
        raise BadYamlError(f"a value cannot be read: {error}", _line(node)) from error


def load(text: str) -> Any:
    """Raises BadYamlError."""
    node, loader = compose(text)
    try:
        return None if node is None else construct(node, loader)
    finally:
        loader.dispose()


def load_file(path: Path) -> Any:
    """Raises OSError, BadYamlError."""
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadYamlError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    return load(text)


def _measure(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Values in it, an alias each time it is used."""
    if id(node) in known:
        if not known[id(node)]:
            raise BadYamlError("an alias within itself", _line(node))
        return known[id(node)]
    if depth > MAX_DEPTH:
        raise BadYamlError("nested too deeply", _line(node))
    known[id(node)] = 0
    size = 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            size += _measure(key, known, depth + 1) + _measure(value, known, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            size += _measure(value, known, depth + 1)
    if size > MAX_VALUES:
        raise BadYamlError(f"more than {MAX_VALUES} values, aliases unfolded", _line(node))
    known[id(node)] = size
    return size


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _bad(error: yaml.YAMLError) -> BadYamlError:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return BadYamlError(str(error.problem or error.context), mark.line + 1 if mark else 0)
    return BadYamlError(str(error).splitlines()[0])
