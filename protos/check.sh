#!/usr/bin/env bash
# Fails when the committed stubs are not what the protos generate, or when the contract breaks buf's lint rules.
# PYTHON names the interpreter of the virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python}
BIN=$(dirname "$PYTHON")
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

OUT=$SCRATCH protos/generate.sh
for folder in milvuscdc buf; do
  if ! diff -r -x __pycache__ "clients/$folder" "$SCRATCH/$folder"; then
    echo "clients/$folder is not what the protos generate: run 'make protos' and commit the result" >&2
    exit 1
  fi
done

# buf would fetch google/api from its registry; an image built by protoc needs no network.
GOOGLE=$("$PYTHON" -c 'import google.api.http_pb2 as m, os; print(os.path.abspath(os.path.join(os.path.dirname(m.__file__), "../..")))')
"$PYTHON" -m grpc_tools.protoc -I protos -I "$GOOGLE" --include_imports --include_source_info \
  --descriptor_set_out="$SCRATCH/image.binpb" protos/milvuscdc/v1/*.proto
"$BIN/buf" lint "$SCRATCH/image.binpb" --config protos/buf.yaml
