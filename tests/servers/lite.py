"""Real milvus-lite servers on loopback: 2.5.1, a program of its own, and 3.2, a rewrite in Python.

Law: data and port stay through stop, kill and restart.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import grpc
from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess
from tests.servers.wheels import MILVUS_LITE_2, MILVUS_LITE_3, unpacked_wheels

LiteVersion = Literal["2.5.1", "3.2.2"]


class MilvusLiteServer(ManagedProcess):
    """`uri` for clients; everything it keeps is below `folder`."""

    def __init__(self, folder: Path, version: LiteVersion, *, name: str = "lite") -> None:
        self.version = version
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.uri = f"http://{self.address}"
        argv: list[str | Path]
        if version == "2.5.1":
            programs = unpacked_wheels(MILVUS_LITE_2) / "milvus_lite" / "lib"
            # As milvus_lite.server starts it: database, address, level. Its libraries are for it
            # alone: the Python that starts it would take them for its own.
            argv = ["env", f"LD_LIBRARY_PATH={programs}", programs / "milvus"]
            argv += [folder / "lite.db", self.address, "ERROR"]
            env = {}
        else:
            packages = unpacked_wheels(MILVUS_LITE_3)
            argv = [sys.executable, "-m", "milvus_lite", "server"]
            argv += ["--data-dir", folder / "data", "--host", "127.0.0.1", "--port", str(port)]
            path = [str(packages), os.environ.get("PYTHONPATH", "")]
            env = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        super().__init__(name, argv, folder, env=env, ports=(port,), ready=self._answers)

    def _answers(self) -> bool:
        with grpc.insecure_channel(self.address) as channel:
            try:
                reply = milvus_pb2_grpc.MilvusServiceStub(channel).ShowCollections(
                    milvus_pb2.ShowCollectionsRequest(), timeout=5
                )
            except grpc.RpcError:
                return False
        return bool(reply.status.code == 0 and reply.status.error_code == 0)
