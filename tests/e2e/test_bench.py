"""The benchmark's programs are tried by hand; here only that its page explains every row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_explains_every_row() -> None:
    listed = subprocess.run(
        [sys.executable, ROOT / "bench" / "run.py", "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    page = ROOT.joinpath("docs", "bench.md").read_text()
    explained = {
        name
        for line in page.splitlines()
        if line.startswith("| ")
        for name in line.split("|")[1].replace(",", " ").split()
    }
    assert [row for row in listed if row not in explained] == []
