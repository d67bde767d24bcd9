"""Roles, their members and grants, and privilege groups of a Milvus.

Laws: a look changes nothing; a call for what is there already, or is gone already, succeeds; users
are made and removed only as the source's own operations say.

Facts of 2.3.5, seen: OperatePrivilege wants an `authorization` header even where nobody has to
log in, and takes the grantor from it; SelectGrant shows the grants of one database and those on
every database; a role with grants cannot be dropped; a user who is not there cannot get a role.
Privilege groups are those of 2.5 (milvus `internal/proxy/impl.go`), unproved on a server.
"""

from __future__ import annotations

import base64
from typing import Any

from milvus_cdc.errors import CdcError, UserError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.model import RoleGrant
from milvus_cdc.sink.metadata import (
    CredentialAction,
    CredentialChange,
    RbacState,
    RbacWish,
    asked_databases,
)

_SECONDS = 20.0
_GRANTOR = (("authorization", base64.b64encode(b"root:").decode()),)
"""Named as grantor where no token is configured; a server that checks refuses it like none."""


class AccessControl:
    """Of one server."""

    def __init__(self, client: MilvusClient) -> None:
        self._client = client

    async def look(self, wish: RbacWish) -> RbacState:
        """Raises UserError SINK_UNSUPPORTED where the server knows no roles."""
        users = await self._call("ListCredUsers", milvus_pb2.ListCredUsersRequest())
        roles = await self._call("SelectRole", milvus_pb2.SelectRoleRequest(include_user_info=True))
        state = RbacState(users=set(users.usernames))
        for found in roles.results:
            state.roles.add(found.role.name)
            state.members.update((user.name, found.role.name) for user in found.users)
        for role in sorted({grant.role for grant in (*wish.grants, *wish.dropped_grants)}):
            if role in state.roles:
                for database in asked_databases(wish, role):
                    state.grants.update(await self._grants(role, database))
        if wish.privilege_groups or wish.dropped_privilege_groups:
            groups = await self._call(
                "ListPrivilegeGroups", milvus_pb2.ListPrivilegeGroupsRequest()
            )
            for group in groups.privilege_groups:
                names = {each.name for each in group.privileges}
                state.privilege_groups[group.group_name] = names
        return state

    async def _grants(self, role: str, database: str) -> set[RoleGrant]:
        entity = milvus_pb2.GrantEntity(role=milvus_pb2.RoleEntity(name=role), db_name=database)
        answer = await self._call("SelectGrant", milvus_pb2.SelectGrantRequest(entity=entity))
        return {
            RoleGrant(
                found.role.name or role,
                found.object.name,
                found.object_name,
                found.db_name or "default",
                found.grantor.privilege.name,
            )
            for found in answer.entities
        }

    # ---- changes

    async def create_role(self, role: str) -> None:
        entity = milvus_pb2.RoleEntity(name=role)
        await self._tolerant(
            "CreateRole", milvus_pb2.CreateRoleRequest(entity=entity), "already exist"
        )

    async def drop_role(self, role: str) -> None:
        """Raises UserError SINK_ROLE_IN_USE when others gave it something."""
        try:
            await self._client.ask(
                "DropRole", milvus_pb2.DropRoleRequest(role_name=role), timeout=_SECONDS
            )
        except Refusal as refusal:
            if refusal.says("not found the role"):
                return
            if refusal.says("has privileges"):
                raise UserError(
                    "SINK_ROLE_IN_USE",
                    f"role {role!r} was dropped at the source and has grants at the sink that "
                    "this task did not make; revoke them there, or keep the role",
                ) from refusal
            raise self._client.error(refusal) from refusal

    async def operate_member(self, user: str, role: str, *, remove: bool = False) -> None:
        kind = milvus_pb2.OperateUserRoleType.RemoveUserFromRole
        if not remove:
            kind = milvus_pb2.OperateUserRoleType.AddUserToRole
        request = milvus_pb2.OperateUserRoleRequest(username=user, role_name=role, type=kind)
        await self._tolerant(
            "OperateUserRole", request, *(("not found", "not exist") if remove else ())
        )

    async def operate_grant(self, grant: RoleGrant, *, revoke: bool = False) -> None:
        kind = milvus_pb2.OperatePrivilegeType.Revoke
        if not revoke:
            kind = milvus_pb2.OperatePrivilegeType.Grant
        request = milvus_pb2.OperatePrivilegeRequest(
            entity=milvus_pb2.GrantEntity(
                role=milvus_pb2.RoleEntity(name=grant.role),
                object=milvus_pb2.ObjectEntity(name=grant.object_type),
                object_name=grant.object_name,
                db_name=grant.database,
                grantor=milvus_pb2.GrantorEntity(
                    privilege=milvus_pb2.PrivilegeEntity(name=grant.privilege)
                ),
            ),
            type=kind,
        )
        try:
            await self._client.ask(
                "OperatePrivilege",
                request,
                timeout=_SECONDS,
                headers=() if self._client.metadata else _GRANTOR,
            )
        except Refusal as refusal:
            if not (revoke and refusal.says("not found the role", "not exist")):
                raise self._client.error(refusal) from refusal

    async def put_group(self, name: str, privileges: tuple[str, ...]) -> None:
        """With exactly these privileges."""
        listed = await self._call("ListPrivilegeGroups", milvus_pb2.ListPrivilegeGroupsRequest())
        there = {group.group_name: group for group in listed.privilege_groups}
        if name not in there:
            request = milvus_pb2.CreatePrivilegeGroupRequest(group_name=name)
            await self._tolerant("CreatePrivilegeGroup", request, "already exist")
        held = {each.name for each in there[name].privileges} if name in there else set()
        kinds = milvus_pb2.OperatePrivilegeGroupType
        changes = (
            (kinds.AddPrivilegesToGroup, set(privileges) - held),
            (kinds.RemovePrivilegesFromGroup, held - set(privileges)),
        )
        for kind, names in changes:
            if names:
                request = milvus_pb2.OperatePrivilegeGroupRequest(
                    group_name=name,
                    privileges=[milvus_pb2.PrivilegeEntity(name=each) for each in sorted(names)],
                    type=kind,
                )
                await self._call("OperatePrivilegeGroup", request)

    async def drop_group(self, name: str) -> None:
        request = milvus_pb2.DropPrivilegeGroupRequest(group_name=name)
        await self._tolerant("DropPrivilegeGroup", request, "not found", "not exist")

    async def change_credential(self, change: CredentialChange) -> None:
        match change.action:
            case CredentialAction.CREATE:
                request = milvus_pb2.CreateCredentialRequest(
                    username=change.user, password=change.password
                )
                await self._tolerant("CreateCredential", request, "already exist")
            case CredentialAction.UPDATE:
                request = milvus_pb2.UpdateCredentialRequest(
                    username=change.user,
                    oldPassword=change.old_password,
                    newPassword=change.password,
                )
                await self._call("UpdateCredential", request)
            case CredentialAction.DELETE:
                request = milvus_pb2.DeleteCredentialRequest(username=change.user)
                await self._tolerant("DeleteCredential", request, "not found", "not exist")

    # ---- calls

    async def _call(self, method: str, request: Any) -> Any:
        return await self._client.call(method, request, timeout=_SECONDS)

    async def _tolerant(self, method: str, request: Any, *allowed: str) -> None:
        try:
            await self._client.ask(method, request, timeout=_SECONDS)
        except Refusal as refusal:
            if not (allowed and refusal.says(*allowed)):
                raise self._client.error(refusal) from refusal


def unsupported(error: CdcError) -> bool:
    """The server does not know the call."""
    return error.reason == "SINK_UNSUPPORTED"
