"""One connection to a controller: its line, its credentials, and how a call is made on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import grpc
from milvuscdc.v1 import fleet_service_pb2_grpc, task_service_pb2_grpc

from milvus_cdc.control.refusal import api_error
from milvus_cdc.trust.dialing import Credentials, Line, Showing

DEFAULT_ADDRESS = "127.0.0.1:7070"
PAGE_SIZE = 1000
MAX_BACKOFF_SECONDS = 5.0
"""Between tries of a watch that was cut."""


class Connection:
    """What all calls share; every unary call ends within `timeout_seconds`."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_seconds: float = 30.0,
        credentials: Credentials | None = None,
    ) -> None:
        """`credentials`: TLS and a token, see `milvus_cdc.trust`; plaintext without. Raises
        UserError TOKEN_IN_CLEAR.
        """
        self.address = address
        self._timeout = timeout_seconds
        self._credentials = credentials or Credentials()
        self._line = Line(address, self._credentials)

    # The generated stubs are typed for synchronous channels. A new channel comes when certificates
    # have changed, so they are made for each call; that costs microseconds.
    @property
    def _tasks(self) -> Any:
        return Showing(task_service_pb2_grpc.TaskServiceStub, self._line, self._credentials)

    @property
    def _fleet(self) -> Any:
        return Showing(fleet_service_pb2_grpc.FleetServiceStub, self._line, self._credentials)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._line.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as err:
            raise api_error(err) from err

    async def _pages(self, method: Any, request: Any, items: str) -> AsyncIterator[Any]:
        while True:
            answer = await self._call(method, request)
            for item in getattr(answer, items):
                yield item
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token
