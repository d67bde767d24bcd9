"""Options of the command that say whom it trusts and who it is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from milvus_cdc.errors import UserError
from milvus_cdc.trust.dialing import Credentials
from milvus_cdc.trust.settings import ClientTls, TokenFrom

_PREFIX = "MILVUS_CDC_"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls", action="store_true", help="the controller listens with TLS")
    for option, metavar, text in (
        ("--ca-file", "FILE", "authorities to trust instead of the system's; implies --tls"),
        ("--certificate-file", "FILE", "your certificate, for mutual TLS; implies --tls"),
        ("--key-file", "FILE", "its key"),
        ("--server-name", "NAME", "what the server's certificate says instead of the host"),
        ("--token-file", "FILE", "your bearer token"),
    ):
        parser.add_argument(option, metavar=metavar, help=text)
    parser.add_argument(
        "--insecure", action="store_true", help="send the token without TLS to another machine"
    )


def credentials(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Credentials, bool]:
    """And whether they are for TLS. Raises UserError."""

    def said(name: str) -> str:
        return getattr(args, name, "") or environ.get(_PREFIX + name.upper(), "")

    def meant(name: str) -> bool:
        if getattr(args, name, False):
            return True
        word = environ.get(_PREFIX + name.upper(), "").lower()
        if word not in ("", "true", "false"):
            raise UserError("OPTION_INVALID", f"{_PREFIX}{name.upper()} must be true or false")
        return word == "true"

    def path(name: str) -> Path | None:
        return Path(said(name)) if said(name) else None

    wanted = ("ca_file", "certificate_file", "key_file", "server_name")
    tls = None
    if meant("tls") or any(said(name) for name in wanted):
        try:
            tls = ClientTls(
                ca_file=path("ca_file"),
                certificate_file=path("certificate_file"),
                key_file=path("key_file"),
                server_name=said("server_name"),
            )
        except ValidationError as error:
            raise UserError(
                "OPTION_INVALID", "--certificate-file and --key-file belong together"
            ) from error
    token_file = path("token_file")
    made = Credentials(
        tls=tls,
        token="" if token_file else environ.get(_PREFIX + "TOKEN", ""),
        token_from=TokenFrom(file=token_file) if token_file else None,
        insecure=meant("insecure"),
    )
    return made, tls is not None


def advice(message: str, tls: bool) -> str:
    """For a connection that could not be made, by what gRPC says of it; empty when it is not
    about TLS.
    """
    if "CERTIFICATE_VERIFY_FAILED" in message or "not verified" in message:
        return (
            "its certificate is of another authority or for another name: --ca-file, --server-name"
        )
    if tls and ("handshake" in message or "WRONG_VERSION" in message):
        return "it listens without TLS, or wants a certificate of yours: --certificate-file"
    if not tls and any(word in message for word in ("closed", "reset", "GOAWAY", "shutdown")):
        return "if it listens with TLS, say --tls or --ca-file"
    return ""
