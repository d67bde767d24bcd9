"""Lets a call through when its caller has one of the roles that its method is for.

Laws: a method without a rule is for nobody; health alone is open; a stream ends when its caller
would not be let in any more; nobody has more under way at a time than his share.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from milvus_cdc.trust.audit import Audit
from milvus_cdc.trust.authentication import Authenticator, Metadata, names_of
from milvus_cdc.trust.caller import ANYBODY, Caller, Role, enter
from milvus_cdc.trust.quotas import Counted, Quotas
from milvus_cdc.trust.refusal import Refusal, reason_of

RECHECK_SECONDS = 10.0
"""Between two looks at the caller of a stream."""

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class Rule:
    """Of one method."""

    roles: frozenset[Role]
    changes: bool = False
    """Something: it gets a line in the audit log."""
    open: bool = False
    """For everybody."""
    streams: bool = False
    """In either direction. Who passes calls on sees each of them as a stream."""


OPEN = Rule(frozenset(), open=True)
VIEWERS = frozenset((Role.VIEWER, Role.OPERATOR, Role.ADMIN))
OPERATORS = frozenset((Role.OPERATOR, Role.ADMIN))
ADMINS = frozenset((Role.ADMIN,))
EVERYWHERE: Mapping[str, Rule] = {
    "/grpc.health.v1.Health/Check": OPEN,
    "/grpc.health.v1.Health/List": OPEN,
    "/grpc.health.v1.Health/Watch": OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule(VIEWERS, streams=True),
}
"""What both services serve."""


class Guard(grpc.aio.ServerInterceptor):
    """Before every method of a server. Without an authenticator everybody may do everything,
    without quotas as much of it at a time as he likes.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        authenticator: Authenticator | None,
        quotas: Quotas | None = None,
    ) -> None:
        self._rules = rules
        self._authenticator = authenticator
        self._counted = Counted(quotas) if quotas is not None else None
        self._audit = Audit()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        rule = self._rules.get(handler_call_details.method)
        if rule is not None and rule.open:
            return handler
        return self._guarded(handler_call_details.method, rule, handler)

    def _guarded(self, method: str, rule: Rule | None, handler: Handler) -> Handler:
        any_handler: Any = handler
        inner: Any = (
            any_handler.unary_unary
            or any_handler.unary_stream
            or any_handler.stream_unary
            or any_handler.stream_stream
        )
        passed_on = handler.request_deserializer is None
        streams = handler.request_streaming or handler.response_streaming

        async def call(request: Any, context: Context) -> Any:
            async with self._let_in(method, rule, request, context, streams, passed_on):
                return await inner(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with (
                self._let_in(method, rule, request, context, streams, passed_on),
                contextlib.aclosing(inner(request, context)) as answers,
            ):
                async for answer in answers:
                    yield answer

        outer: Any = stream if inspect.isasyncgenfunction(inner) else call
        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        made: Handler = make(outer, handler.request_deserializer, handler.response_serializer)
        return made

    @asynccontextmanager
    async def _let_in(
        self,
        method: str,
        rule: Rule | None,
        request: Any,
        context: Context,
        streams: bool,
        passed_on: bool,
    ) -> AsyncIterator[None]:
        """Around the handling of one call."""
        caller: Caller | None = None
        metadata: Metadata = tuple(context.invocation_metadata() or ())
        origin = self.origin(metadata, context)
        asked = None if streams else request
        recheck: asyncio.Task[None] | None = None
        ended: list[Refusal] = []
        under_way = contextlib.ExitStack()
        try:
            try:
                caller = await self.caller(metadata, context)
                self._allow(method, rule, caller)
                if self._counted is not None:
                    lasting = streams if rule is None else rule.streams
                    under_way.enter_context(self._counted.call(caller, lasting))
            except Refusal as refusal:
                self._audit.call(caller, origin, method, asked, refusal.kind, refusal.reason)
                await refusal.abort(context)
            enter(caller)
            if streams and self._authenticator is not None:
                recheck = asyncio.create_task(
                    self._recheck(method, rule, metadata, context, asyncio.current_task(), ended)
                )
            try:
                yield
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not ended or task is None:
                    if rule is not None and rule.changes:
                        # It may have been done.
                        self._audit.call(
                            caller, origin, method, asked, "CANCELLED", "", passed_on=passed_on
                        )
                    raise
                task.uncancel()
                self._audit.call(caller, origin, method, asked, ended[0].kind, ended[0].reason)
                await ended[0].abort(context)
            except BaseException:
                if rule is None or not rule.changes:
                    raise
                code = _code(context)
                self._audit.call(
                    caller, origin, method, asked, code, reason_of(context), passed_on=passed_on
                )
                raise
            if rule is not None and rule.changes:
                code = "OK" if _code(context) == "UNKNOWN" else _code(context)
                self._audit.call(caller, origin, method, asked, code, "", passed_on=passed_on)
        finally:
            under_way.close()
            if recheck is not None:
                recheck.cancel()

    async def caller(self, metadata: Metadata, context: Context) -> Caller:
        """Who calls. Raises Refusal."""
        peer: Any = context.auth_context()
        if self._authenticator is not None:
            return await self._authenticator.caller(metadata, peer)
        names = names_of(peer)
        return Caller(names[0], "certificate", ANYBODY.roles) if names else ANYBODY

    def origin(self, metadata: Metadata, context: Context) -> str:
        """Where it comes from."""
        return context.peer()

    def _allow(self, method: str, rule: Rule | None, caller: Caller) -> None:
        if self._authenticator is None:
            return
        if rule is None:
            raise Refusal(
                "PERMISSION_DENIED",
                "METHOD_FOR_NOBODY",
                f"{method} is not among the methods that this version gives to any role.",
                method=method,
            )
        if caller.roles.isdisjoint(rule.roles):
            needed = ", ".join(sorted(rule.roles))
            has = ", ".join(sorted(caller.roles)) or "none"
            raise Refusal(
                "PERMISSION_DENIED",
                "ROLE_MISSING",
                f"{method} is for the roles {needed}; {caller.name} has {has}.",
                method=method,
                roles=needed,
            )

    async def _recheck(
        self,
        method: str,
        rule: Rule | None,
        metadata: Metadata,
        context: Context,
        handling: asyncio.Task[Any] | None,
        ended: list[Refusal],
    ) -> None:
        while handling is not None:
            await asyncio.sleep(RECHECK_SECONDS)
            try:
                self._allow(method, rule, await self.caller(metadata, context))
            except Refusal as refusal:
                if refusal.kind == "UNAVAILABLE":
                    continue
                ended.append(refusal)
                handling.cancel()
                return


def _code(context: Context) -> str:
    """The status that an ended call was given; UNKNOWN when it was given none."""
    given: Any = context.code()
    if isinstance(given, grpc.StatusCode):
        return given.name
    by_number = {code.value[0]: code.name for code in grpc.StatusCode}
    return by_number.get(given or 0, "UNKNOWN") if given else "UNKNOWN"
