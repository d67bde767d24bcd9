"""An S3-compatible store on loopback: moto in server mode. What it holds is gone when it stops."""

from __future__ import annotations

import json
import ssl
import sys
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.servers.certificates import Authority
from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess

KEY_ID, SECRET, REGION = "test-key", "test-secret", "us-east-1"


class S3Server(ManagedProcess):
    """`endpoint` for clients; any key is let in, until `lock`."""

    def __init__(
        self, folder: Path, *, name: str = "s3", authority: Authority | None = None
    ) -> None:
        """With an `authority` it speaks TLS."""
        self.port = free_port()
        self.endpoint = f"{'https' if authority else 'http'}://127.0.0.1:{self.port}"
        argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._trust: Path | None = None
        if authority is not None:
            own, self._trust = authority.server(name), authority.ca_file
            argv += ["-s", "-c", str(own.certificate), "-k", str(own.key)]
        super().__init__(name, argv, folder, ports=[self.port], ready=self._answers)

    def make_bucket(self) -> str:
        """A new one."""
        bucket = f"b{uuid.uuid4().hex[:12]}"
        client = self._client("s3")
        client.create_bucket(Bucket=bucket)
        client.close()
        return bucket

    def make_key(self) -> tuple[str, str]:
        """Of a new user of IAM, who may do everything: its id and its secret."""
        client, user = self._client("iam"), f"u{uuid.uuid4().hex[:12]}"
        client.create_user(UserName=user)
        policy = {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
        }
        client.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=json.dumps(policy))
        key = client.create_access_key(UserName=user)["AccessKey"]
        client.close()
        return key["AccessKeyId"], key["SecretAccessKey"]

    def _client(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            verify=None if self._trust is None else str(self._trust),
            config=Config(retries={"total_max_attempts": 1}),
        )

    def lock(self, locked: bool) -> None:
        """While locked only keys that IAM made are let in."""
        self._post("/moto-api/reset-auth", b"0" if locked else b"inf")

    def _post(self, path: str, body: bytes) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}{path}", body, {"Content-Type": "text/plain"}
        )
        with self._open(request):
            pass

    def _answers(self) -> bool:
        with self._open(f"{self.endpoint}/moto-api/") as answer:
            return bool(answer.status == 200)

    def _open(self, request: str | urllib.request.Request) -> Any:
        tls = None if self._trust is None else ssl.create_default_context(cafile=self._trust)
        return urllib.request.urlopen(request, timeout=10, context=tls)
