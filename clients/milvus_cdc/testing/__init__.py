"""For authors of sinks and formats: changes as the log has them, and the contract that every sink
of ours passes. See docs/writing-a-sink.md.
"""

import contextlib

with contextlib.suppress(ImportError):
    import pytest

    # So that a failing assertion of the contract shows its values.
    pytest.register_assert_rewrite(
        *(
            f"{__name__}.{module}"
            for module in ("harness", "own_checkpoint", "schema_changes", "writer_contract")
        )
    )
