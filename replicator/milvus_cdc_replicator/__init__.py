import os

# Read when gRPC is imported. A line for each handshake that fails, whatever `log.level` is, would
# let strangers fill the log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
