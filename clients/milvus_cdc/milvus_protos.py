"""Milvus' protobuf messages and stubs, without the rest of pymilvus.

Law: there is one copy of Milvus' protos in a process, the one pymilvus brings (a second
`common.proto` collides). `import pymilvus` also loads pandas and an ORM, about 55 MB that no
service of ours needs, so the generated modules are imported below a stand-in for their parent
package, which is taken away again: whoever imports pymilvus itself, before or after, gets the real
one with these same modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

_PARENT = "pymilvus"


def _load(name: str) -> Any:
    return importlib.import_module(f"{_PARENT}.grpc_gen.{name}")


def _stand_in() -> ModuleType:
    spec = importlib.util.find_spec(_PARENT)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("pymilvus is not installed", name=_PARENT)
    module = ModuleType(_PARENT)
    module.__path__ = list(spec.submodule_search_locations)
    return module


_inserted = _PARENT not in sys.modules
if _inserted:
    sys.modules[_PARENT] = _stand_in()
try:
    common_pb2: Any = _load("common_pb2")
    schema_pb2: Any = _load("schema_pb2")
    milvus_pb2: Any = _load("milvus_pb2")
    msg_pb2: Any = _load("msg_pb2")
    milvus_pb2_grpc: Any = _load("milvus_pb2_grpc")
finally:
    if _inserted:
        del sys.modules[_PARENT]

__all__ = ["common_pb2", "milvus_pb2", "milvus_pb2_grpc", "msg_pb2", "schema_pb2"]
