"""Python client of the controller's API: asynchronous, typed by the generated messages.

Every failure is an ApiError with the server's `google.rpc.ErrorInfo` and, for a refused field, its
path.
"""

from milvus_cdc.control.connection import DEFAULT_ADDRESS
from milvus_cdc.control.fleet import FleetCalls
from milvus_cdc.control.refusal import ApiError
from milvus_cdc.control.tasks import TaskCalls


class ControlClient(TaskCalls, FleetCalls):
    """One connection to a controller; every unary call ends within `timeout_seconds`."""


__all__ = ["DEFAULT_ADDRESS", "ApiError", "ControlClient"]
