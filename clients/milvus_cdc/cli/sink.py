"""`milvus-cdc sink create-user`: the one step of roles that a person has to do."""

from __future__ import annotations

import argparse
import asyncio
import base64
import getpass
import os
import sys

from milvus_cdc.cli.commands import read_text
from milvus_cdc.cli.task_file import InputError
from milvus_cdc.control import ControlClient
from milvus_cdc.errors import CdcError
from milvus_cdc.milvus_client import MilvusClient, Refusal
from milvus_cdc.milvus_protos import milvus_pb2
from milvus_cdc.tls import Fields, TlsFiles

_REFUSED, _UNREACHABLE = 3, 4
_SECONDS = 20.0


async def create_user(client: ControlClient, args: argparse.Namespace) -> int:
    """Makes a user at a sink. Talks to the sink alone. Raises InputError."""
    token_of(args.token_env)
    password = await asyncio.to_thread(_password, args.password_file, args.user)
    request = milvus_pb2.CreateCredentialRequest(
        username=args.user, password=base64.b64encode(password.encode()).decode()
    )
    try:
        async with milvus_of(args) as milvus:
            try:
                await milvus.ask("CreateCredential", request, timeout=_SECONDS)
            except Refusal as refusal:
                if refusal.says("already exist"):
                    print(f"error: user {args.user!r} is at {args.uri} already", file=sys.stderr)
                    print("hint: nothing is left to do; its roles follow", file=sys.stderr)
                    return _REFUSED
                raise milvus.error(refusal) from refusal
    except CdcError as error:
        print(f"error: {error.message} ({error.reason})", file=sys.stderr)
        print("hint: check --uri, and name a token that may create users", file=sys.stderr)
        return _UNREACHABLE if error.reason == "SINK_UNAVAILABLE" else _REFUSED
    print(f"user {args.user} created at {args.uri}; its roles follow within seconds")
    return 0


def milvus_options(parser: argparse.ArgumentParser) -> None:
    """How to reach a Milvus with one's own hands."""
    parser.add_argument("--uri", required=True, help="of the Milvus, for example http://host:19530")
    parser.add_argument(
        "--token-env", default="", metavar="VAR", help="variable with user:password or an API key"
    )
    for option, text in (
        ("--milvus-ca-file", "authorities to trust, PEM; default: the system's"),
        ("--milvus-certificate-file", "a certificate to show, PEM"),
        ("--milvus-key-file", "its key, PEM"),
    ):
        parser.add_argument(option, default="", metavar="FILE", help=text)
    parser.add_argument(
        "--milvus-server-name",
        default="",
        metavar="NAME",
        help="that the server's certificate must have",
    )


def milvus_of(args: argparse.Namespace) -> MilvusClient:
    """Raises InputError, UserError."""
    files = (
        args.milvus_ca_file,
        args.milvus_certificate_file,
        args.milvus_key_file,
        args.milvus_server_name,
    )
    # Also without any: errors then name options and not the fields of a task.
    tls = TlsFiles(*files, Fields("", _option))
    given = any(files) or args.uri.startswith("https://")
    return MilvusClient(args.uri, token_of(args.token_env), tls=tls if given else None)


def _option(field: str) -> str:
    return f"--milvus-{field.replace('_', '-')}"


def token_of(variable: str) -> str | None:
    if not variable:
        return None
    token = os.environ.get(variable)
    if not token:
        raise InputError(
            "TOKEN_MISSING",
            f"the environment variable {variable} is not set",
            "set it to user:password or an API key",
        )
    return token


def _password(path: str, user: str) -> str:
    if path:
        password = read_text(path).rstrip("\r\n")
    else:
        try:
            password = getpass.getpass(f"Password for {user}: ")
            again = getpass.getpass("Again: ")
        except EOFError as error:
            raise InputError(
                "NO_TERMINAL", "there is nobody to ask for the password", "use --password-file"
            ) from error
        if password != again:
            raise InputError("PASSWORDS_DIFFER", "the two passwords differ", "try again")
    if not password:
        raise InputError("PASSWORD_EMPTY", "the password is empty", "give one")
    return password
