#!/usr/bin/env bash
# Generates the committed Go stubs below clients/go/milvuscdc/ from protos/.
# Needs go on PATH. PYTHON names the interpreter of the virtual environment, whose grpcio-tools brings protoc,
# OUT the folder that takes the place of clients/go/.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
MODULE=github.com/milvus-cdc/milvus-cdc/clients/go
OUT=${OUT:-clients/go}
command -v go > /dev/null || { echo 'go is not on PATH: install Go 1.21 or newer from https://go.dev/dl' >&2; exit 1; }

PLUGINS=$(mktemp -d)
trap 'rm -rf "$PLUGINS"' EXIT
GOBIN=$PLUGINS go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$PLUGINS go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2

GOOGLE=$("$PYTHON" -c 'import google.api.http_pb2 as m, os; print(os.path.abspath(os.path.join(os.path.dirname(m.__file__), "../..")))')
rm -rf "$OUT/milvuscdc"
PATH="$PLUGINS:$PATH" "$PYTHON" -m grpc_tools.protoc -I protos -I "$GOOGLE" \
  --go_out="$OUT" --go_opt=module="$MODULE" \
  --go-grpc_out="$OUT" --go-grpc_opt=module="$MODULE" \
  protos/milvuscdc/v1/*.proto
