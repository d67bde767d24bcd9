"""Mistakes planted into the shipped code, each of which the simulation must find.

Law: a mutant breaks one promise of the code and nothing else; it is a patch of the running code,
undone when the run is over. `mutants.md` says which seed finds which, and a test proves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

from milvus_cdc_controller.core import controller, events

Plant = Callable[[ExitStack], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    what: str
    plant: Plant
    parts: int = 0
    """Of the world in which it shows: collections are split into so many."""

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        with ExitStack() as stack:
            self.plant(stack)
            yield


MUTANTS: dict[str, Mutant] = {}


def mutant(what: str, *, parts: int = 0) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        name = plant.__name__.replace("_", "-")
        MUTANTS[name] = Mutant(name, what, plant, parts)
        return plant

    return register


def put(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, value))


def handle(stack: ExitStack, event: type[events.Event], handler: Any) -> None:
    """The controller's core meets such events so."""
    stack.enter_context(mock.patch.dict(controller._HANDLERS, {event: handler}))


from tests.sim.mutants import checkpoints, handover, late, leases, recounts, splits  # noqa: E402, F401
