"""What a controller's refusal, or its silence, says: one ApiError for every failure of a call."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.rpc import error_details_pb2, status_pb2

from milvus_cdc.errors import CdcError

_STATUS_DETAILS = "grpc-status-details-bin"
# How gRPC shows a stream that something on the way has cut: RST_STREAM, GOAWAY, a time limit.
_CUT = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)


class ApiError(CdcError):
    """The controller refused, or could not be reached (`unreachable`)."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        field: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason, message, field=field)
        self.code = code
        self.metadata = dict(metadata or {})

    @property
    def unreachable(self) -> bool:
        """No answer came from a controller (as opposed to an answer that says no)."""
        unanswered = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return self.code in unanswered and self.reason in ("UNREACHABLE", "TIMEOUT")


def api_error(err: grpc.aio.AioRpcError) -> ApiError:
    """What an RPC error says, with the details the server attached."""
    code, message, reason, field = err.code(), err.details() or "", "", ""
    metadata: dict[str, str] = {}
    for key, value in err.trailing_metadata() or ():
        if key != _STATUS_DETAILS:
            continue
        status = status_pb2.Status.FromString(value)
        message = status.message or message
        for detail in status.details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info):
                reason = info.reason
                metadata.update(info.metadata)
            elif detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
                said = [v.description for v in bad.field_violations]
                message = "; ".join([message, *(text for text in said if text not in message)])
    if not reason:
        reason = {
            grpc.StatusCode.UNAVAILABLE: "UNREACHABLE",
            grpc.StatusCode.DEADLINE_EXCEEDED: "TIMEOUT",
        }.get(code, code.name)
    field = field or metadata.get("field", "")
    return ApiError(code, reason, message, field=field, metadata=metadata)


def was_cut(err: grpc.aio.AioRpcError) -> bool:
    """The connection is to blame, not the request: all that a controller refuses has details."""
    refused = any(key == _STATUS_DETAILS for key, _ in err.trailing_metadata() or ())
    return err.code() is grpc.StatusCode.UNAVAILABLE or (err.code() in _CUT and not refused)
