"""Several server processes that come up together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tests.servers.process import ManagedProcess


class Ensemble:
    """Processes with one beginning and one end; `with` starts and stops them."""

    @property
    def servers(self) -> Sequence[ManagedProcess]:
        """In the order of starting; stopping goes backwards."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start everything; ServerStartError if a part does not come up, with nothing left."""
        try:
            self.bring_up()
        except BaseException:
            self.stop()
            raise
        return self

    def bring_up(self) -> None:
        """All of them beside each other; who cannot do without another's answer waits for it."""
        for server in self.servers:
            server.spawn()
        for server in self.servers:
            server.wait_ready()

    def stop(self) -> None:
        for server in reversed(self.servers):
            server.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
