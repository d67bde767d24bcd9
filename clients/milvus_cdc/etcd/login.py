"""How a client makes itself known to etcd: TLS, a user, and the token that stands for the user.

Laws: a token is asked for when there is none or etcd refused it, once for all who wait for it; a
login that etcd refused is not tried again before a while or another password, since every try costs
etcd a slow hash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio
from milvuscdc.internal import etcd_rpc_pb2 as pb
from milvuscdc.internal import etcd_rpc_pb2_grpc as rpc

from milvus_cdc.errors import UserError
from milvus_cdc.tls import Fields, TlsFiles

Metadata = tuple[tuple[str, str], ...]

LOGIN_SECONDS = 5.0
"""A busy etcd needs up to a second for the hash."""
REFUSED_SECONDS = 5.0
_ETCD = Fields("etcd")


@dataclass(frozen=True, slots=True)
class EtcdSecurity:
    """What to show an etcd; nothing of it for a plaintext one without users."""

    tls: TlsFiles | None = None
    username: str = ""
    password: Callable[[], str] = str
    """Asked for at every login, so that one replaced where it is kept is taken. May raise
    UserError.
    """
    fields: Fields = _ETCD
    """Where these settings stand."""

    @property
    def tls_fields(self) -> Fields:
        return Fields(self.fields.name("tls"), self.fields.spelled)


def token_refused(error: grpc.aio.AioRpcError) -> bool:
    """Another token may be taken; the request was not executed (etcd `clientv3.shouldRefreshToken`,
    whose third case is a change of users or roles since the token was given).
    """
    details = (error.details() or "").lower()
    return (
        error.code() is grpc.StatusCode.UNAUTHENTICATED
        or "invalid auth token" in details
        or "revision of auth store is old" in details
        or "user name is empty" in details
    )


class Tokens:
    """The newest token of one user, for all members of a cluster."""

    def __init__(self, security: EtcdSecurity) -> None:
        self._security = security
        self._token = ""
        self._logins: dict[str, asyncio.Task[None]] = {}
        """Under way, by endpoint."""
        self._refusal: tuple[str, float, UserError] | None = None
        """Password, until when, what was said."""

    async def get(self, channel: grpc.aio.Channel, endpoint: str, seconds: float) -> Metadata:
        """As a call's metadata. Raises AioRpcError, UserError ETCD_AUTH, TimeoutError."""
        if not self._token:
            login = self._logins.get(endpoint)
            if login is None:
                login = asyncio.create_task(self._log_in(channel, endpoint), name="etcd login")
                login.add_done_callback(lambda done: self._ended(endpoint, done))
                self._logins[endpoint] = login
            # It goes on when the one who waits has no more time, for whoever asks next.
            async with asyncio.timeout(seconds):
                await asyncio.shield(login)
        return (("token", self._token),)

    async def close(self) -> None:
        for login in list(self._logins.values()):
            login.cancel()
            await asyncio.wait({login})

    def _ended(self, endpoint: str, login: asyncio.Task[None]) -> None:
        del self._logins[endpoint]
        if not login.cancelled():
            login.exception()

    def forget(self, refused: Metadata) -> None:
        """Unless another one is known already."""
        if refused == (("token", self._token),):
            self._token = ""

    async def _log_in(self, channel: grpc.aio.Channel, endpoint: str) -> None:
        user, password = self._security.username, self._security.password()
        now = asyncio.get_running_loop().time()
        if self._refusal is not None:
            refused, until, why = self._refusal
            if refused == password and now < until:
                raise UserError(why.reason, why.message, field=why.field)
        request = pb.AuthenticateRequest(name=user, password=password)
        try:
            answer = await rpc.AuthStub(channel).Authenticate(request, timeout=LOGIN_SECONDS)
        except grpc.aio.AioRpcError as error:
            refusal = self._refused(error, endpoint)
            if refusal is None:
                raise
            self._refusal = (password, now + REFUSED_SECONDS, refusal)
            raise refusal from error
        self._refusal = None
        self._token = answer.token

    def _refused(self, error: grpc.aio.AioRpcError, endpoint: str) -> UserError | None:
        details = (error.details() or "").lower()
        fields = self._security.fields
        if "authentication is not enabled" in details:
            name = fields.name("username")
            return UserError(
                "ETCD_AUTH",
                f"{name}: etcd at {endpoint} has no users (authentication is not enabled); leave "
                "user and password out, or enable it there",
                field=name,
            )
        if "authentication failed" in details:
            name = fields.name("password")
            return UserError(
                "ETCD_AUTH",
                f"{name}: etcd at {endpoint} refuses user {self._security.username!r} with this "
                "password",
                field=name,
            )
        return None
