"""Of messages behind ticks that cover them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from milvus_cdc.order import lane as lanes

from tests.sim.mutants import mutant, put


@mutant("what comes behind a tick that covers it is left out")
def late_left_out(stack: ExitStack) -> None:
    add = lanes.Lane.add

    def on_time(self: Any, op: Any) -> bool:
        late = self._started and op.ts <= self.released_ts and not self.rereading
        return not late and add(self, op)

    put(stack, lanes.Lane, "add", on_time)


@mutant("what comes behind a tick that covers it takes effect when it comes")
def late_in_log_order(stack: ExitStack) -> None:
    add = lanes.Lane.add

    def as_it_comes(self: Any, op: Any) -> bool:
        kept = add(self, op)
        self._late, self._late_orders, self._late_from = [], set(), 0
        return kept

    put(stack, lanes.Lane, "add", as_it_comes)


@mutant("a new owner leaves out whatever is no newer than its checkpoint, wherever it stands")
def checkpoint_taken_by_time(stack: ExitStack) -> None:
    begin, add = lanes.Lane.__init__, lanes.Lane.add

    def noting(self: Any, *names: Any, **values: Any) -> None:
        begin(self, *names, **values)
        self.began_ts = self.resolved_ts

    def newer(self: Any, op: Any) -> bool:
        return (op.ts > self.began_ts or self.rereading) and add(self, op)

    put(stack, lanes.Lane, "__init__", noting)
    put(stack, lanes.Lane, "add", newer)
