"""Of what is done about requests that may come after their owner was lost."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from milvus_cdc_controller import specs
from milvus_cdc_controller.core import sessions
from milvus_cdc_controller.core.collection import Recounted as Verdict
from milvus_cdc_replicator import recount
from milvus_cdc_replicator.core import tally
from milvus_cdc_replicator.report import Recounted

from tests.sim.mutants import mutant, put


@mutant("nothing is left to be recounted when an owner is lost")
def loss_leaves_nothing(stack: ExitStack) -> None:
    put(stack, sessions, "owner_lost", lambda *_: None)


@mutant("keys are recounted as soon as the window is closed")
def recounted_too_soon(stack: ExitStack) -> None:
    put(stack, recount, "SETTLE_SECONDS", 0.0)


@mutant("whatever is found, keys count as right")
def found_right(stack: ExitStack) -> None:
    put(stack, recount.Recounting, "_judge", lambda *_: Recounted.DONE)


@mutant("keys found wrong are not written again")
def not_written_again(stack: ExitStack) -> None:
    def over(progress: Any, verdict: Verdict) -> Any:
        return progress if verdict is Verdict.NOT_YET else replace(progress, recount=None)

    put(stack, sessions, "recounted", over)


@mutant("who is lost while writing again leaves nothing to wait for")
def lost_while_writing_again(stack: ExitStack) -> None:
    wanted = specs._wanted

    def as_first(left: Any) -> Any:
        return wanted(left and replace(left, lost_again=False))

    put(stack, specs, "_wanted", as_first)


@mutant("what owners in between took is not read again to recount keys")
def past_forgotten(stack: ExitStack) -> None:
    put(stack, recount.Recounting, "_past_of", lambda *_: None)


@mutant("deleted keys are not counted")
def deleted_not_counted(stack: ExitStack) -> None:
    expected = tally.Tally.expected

    def there(self: Any, partition: str, keys: Any) -> Any:
        return {key: n for key, n in expected(self, partition, keys).items() if n}

    put(stack, tally.Tally, "expected", there)
