"""Errors of our API: a canonical status with google.rpc.ErrorInfo (domain `milvuscdc.io`),
always.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from milvus_cdc.errors import CdcError, RetryableError, UserError

from milvus_cdc_controller.loop import Refused
from milvus_cdc_controller.store import LeadershipLost

log = structlog.get_logger(__name__)

DOMAIN = "milvuscdc.io"
_DETAILS_KEY = "grpc-status-details-bin"

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class ApiError(Exception):
    """`kind` is the canonical status code's name; `field` the request's field to blame, if one
    is.
    """

    def __init__(
        self,
        kind: str,
        reason: str,
        message: str,
        *,
        field: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = metadata or {}
        self.violations = violations
        if field and kind == "INVALID_ARGUMENT" and not violations:
            self.violations = ((field, message),)

    def status(self) -> status_pb2.Status:
        metadata = dict(self.metadata)
        if self.field:
            metadata.setdefault("field", self.field)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)
        details = [_pack(info)]
        if self.violations:
            bad = error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                    for field, text in self.violations
                ]
            )
            details.append(_pack(bad))
        return status_pb2.Status(
            code=code_pb2.Code.Value(self.kind), message=self.message, details=details
        )


def of(error: Exception) -> ApiError:
    """What a caller is told of any error."""
    match error:
        case ApiError():
            return error
        case Refused(refusal=refusal):
            return ApiError(
                refusal.kind,
                refusal.reason,
                refusal.message,
                field=refusal.field,
                metadata=dict(refusal.metadata),
            )
        case UserError():
            return ApiError("FAILED_PRECONDITION", error.reason, error.message, field=error.field)
        case RetryableError() | LeadershipLost():
            return ApiError("UNAVAILABLE", error.reason, error.message, field=error.field)
        case CdcError():
            return ApiError("INTERNAL", error.reason, error.message, field=error.field)
    log.exception("a call failed", exc_info=error)
    return ApiError("INTERNAL", "INTERNAL", "An error of the controller; see its log.")


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ApiError) -> NoReturn:
    await context.abort(
        getattr(grpc.StatusCode, error.kind),
        error.message,
        trailing_metadata=((_DETAILS_KEY, error.status().SerializeToString()),),
    )
    raise AssertionError("abort raises")


def unary(
    method: Callable[[Any, _Request], Awaitable[_Response]],
) -> Callable[[Any, _Request, grpc.aio.ServicerContext[Any, Any]], Awaitable[_Response]]:
    """A unary RPC whose errors reach the caller as statuses."""

    @functools.wraps(method)
    async def call(
        self: Any, request: _Request, context: grpc.aio.ServicerContext[Any, Any]
    ) -> _Response:
        try:
            return await method(self, request)
        except Exception as error:
            await abort(context, of(error))

    return call


def streaming(
    method: Callable[[Any, _Request], AsyncIterator[_Response]],
) -> Callable[[Any, _Request, grpc.aio.ServicerContext[Any, Any]], AsyncIterator[_Response]]:
    """A server-streaming RPC whose errors reach the caller as statuses."""

    @functools.wraps(method)
    async def call(
        self: Any, request: _Request, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[_Response]:
        answers = method(self, request)
        try:
            async for answer in answers:
                yield answer
        except Exception as error:
            await abort(context, of(error))
        finally:
            await answers.aclose()  # type: ignore[attr-defined]

    return call
