"""What a replicator loads only for those sinks that need it."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("pyarrow", "confluent_kafka", "psycopg", "fastavro", "nats")


def test_adapters_are_loaded_when_a_task_asks_for_them() -> None:
    """Memory counts: a replicator that writes to Milvus does without the rest."""
    code = f"""
import sys
import milvus_cdc_replicator.app
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
