from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A store in a file and worker processes on it, killed at the end of the test."""
    site = Site(tmp_path)
    yield site
    site.close()
