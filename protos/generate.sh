#!/usr/bin/env bash
# Generates the committed Python stubs below clients/ (protobuf, gRPC, type stubs) with the pinned grpcio-tools.
# PYTHON names the interpreter of the virtual environment, OUT the folder that takes the place of clients/.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-clients}
BIN=$(dirname "$PYTHON")
GOOGLE=$("$PYTHON" -c 'import google.api, os; print(os.path.dirname(os.path.dirname(os.path.dirname(google.api.__file__ or google.api.http_pb2.__file__))))' 2>/dev/null \
  || "$PYTHON" -c 'import google.api.http_pb2 as m, os; print(os.path.dirname(os.path.dirname(os.path.dirname(m.__file__))))')
# Generated beside the old ones and swapped in at the end: whoever imports them meanwhile finds them whole.
FINAL=$OUT
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
PATH="$BIN:$PATH" "$PYTHON" -m grpc_tools.protoc -I protos -I "$GOOGLE" \
  --python_out="$OUT" --mypy_out="quiet:$OUT" \
  protos/milvuscdc/v1/*.proto protos/milvuscdc/internal/*.proto protos/buf/validate/validate.proto
PATH="$BIN:$PATH" "$PYTHON" -m grpc_tools.protoc -I protos -I "$GOOGLE" \
  --grpc_python_out="$OUT" --mypy_grpc_out="quiet:$OUT" \
  protos/milvuscdc/v1/*_service.proto protos/milvuscdc/internal/etcd_rpc.proto
find "$OUT/milvuscdc" "$OUT/buf" -type d -exec touch {}/__init__.py \;
mkdir -p "$FINAL"
for package in milvuscdc buf; do
  rm -rf "$FINAL/$package"
  mv "$OUT/$package" "$FINAL/$package"
done
