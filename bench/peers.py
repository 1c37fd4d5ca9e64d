"""Other engines, each in an environment of its own, `.venvs/bench-NAME`, made from its locked file as `make` does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lock(name: str) -> Path:
    return ROOT / "requirements" / f"bench-{name}.txt"


def version(name: str, *, package: str = "") -> str:
    found = re.search(rf"^{package or name}==(\S+)", lock(name).read_text(), re.MULTILINE)
    return found.group(1) if found else "?"


def python(name: str) -> Path:
    """The interpreter of a peer's environment, which holds exactly what the lock says."""
    home = ROOT / ".venvs" / f"bench-{name}"
    ready = home / "ready"
    if not ready.exists() or ready.stat().st_mtime < lock(name).stat().st_mtime:
        base: str = sys._base_executable  # type: ignore[attr-defined]
        subprocess.run([ROOT / "scripts" / "setup.sh", home, base, lock(name).relative_to(ROOT)], check=True)
    return home / "bin" / "python"
