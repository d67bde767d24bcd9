"""An S3-compatible store on loopback: moto in server mode. What it holds is gone when it stops."""

from __future__ import annotations

import sys
import urllib.request
import uuid
from pathlib import Path

import boto3
from botocore.config import Config

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess

KEY_ID, SECRET, REGION = "test-key", "test-secret", "us-east-1"


class S3Server(ManagedProcess):
    """`endpoint` for clients; any key is let in, until `lock`."""

    def __init__(self, folder: Path, *, name: str = "s3") -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        super().__init__(name, argv, folder, ports=[self.port], ready=self._answers)

    def make_bucket(self) -> str:
        """A new one."""
        bucket = f"b{uuid.uuid4().hex[:12]}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            config=Config(retries={"total_max_attempts": 1}),
        )
        client.create_bucket(Bucket=bucket)
        client.close()
        return bucket

    def lock(self, locked: bool) -> None:
        """While locked only keys that IAM made are let in, and there are none."""
        self._post("/moto-api/reset-auth", b"0" if locked else b"inf")

    def _post(self, path: str, body: bytes) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}{path}", body, {"Content-Type": "text/plain"}
        )
        with urllib.request.urlopen(request, timeout=10):
            pass

    def _answers(self) -> bool:
        with urllib.request.urlopen(f"{self.endpoint}/moto-api/", timeout=5) as answer:
            return bool(answer.status == 200)
