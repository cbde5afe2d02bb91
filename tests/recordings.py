"""Where the real recordings lie that some tests use: beside the repository, and not needed to use the library."""

from pathlib import Path

import pytest

RECORDINGS = Path(__file__).parents[2] / "shared" / "data"
needs_recordings = pytest.mark.skipif(
    not RECORDINGS.is_dir(), reason=f"the real recordings are not here: this test wants them in {RECORDINGS}."
)
