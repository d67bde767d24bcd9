"""A call that is refused before anything has looked at what it wants."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "milvuscdc.io"
DETAILS_KEY = "grpc-status-details-bin"


class Refusal(Exception):
    """`kind` is the canonical status code's name."""

    def __init__(self, kind: str, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason
        self.message = message
        self.metadata = metadata

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain=DOMAIN, metadata=self.metadata
        )
        packed = any_pb2.Any()
        packed.Pack(info)
        status = status_pb2.Status(
            code=code_pb2.Code.Value(self.kind), message=self.message, details=[packed]
        )
        await context.abort(
            getattr(grpc.StatusCode, self.kind),
            self.message,
            trailing_metadata=((DETAILS_KEY, status.SerializeToString()),),
        )
        raise AssertionError("abort raises")


def unauthenticated(reason: str, message: str, **metadata: str) -> Refusal:
    return Refusal("UNAUTHENTICATED", reason, message, **metadata)


def reason_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Of an aborted call."""
    for key, value in context.trailing_metadata() or ():
        if key == DETAILS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""
