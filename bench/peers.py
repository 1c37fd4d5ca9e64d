"""Other engines, each in an environment of its own (`bench/.venv-NAME`), made at first use from its locked file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lock(name: str) -> Path:
    return ROOT / "requirements" / f"bench-{name}.txt"


def version(name: str) -> str:
    found = re.search(rf"^{name}==(\S+)", lock(name).read_text(), re.MULTILINE)
    return found.group(1) if found else "?"


def python(name: str) -> Path:
    """The interpreter of a peer's environment, which holds exactly what the lock says."""
    home = ROOT / "bench" / f".venv-{name}"
    inside, ready = home / "bin" / "python", home / "ready"
    wanted = f"{sys.version}\n{lock(name).read_text()}"
    if not ready.exists() or ready.read_text() != wanted:
        print(f"making {home.name} from {lock(name).name} …", file=sys.stderr, flush=True)
        uv("venv", "--no-project", "--clear", "--python", sys.executable, str(home))
        uv("pip", "sync", "--python", str(inside), "--require-hashes", str(lock(name)))
        ready.write_text(wanted)
    return inside


def uv(*words: str) -> None:
    """The uv that set-up put into .tools; whoever told pip to use a mirror means uv too."""
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_SYSTEM_CERTS": "1"}
    if not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & environment.keys():
        asked = [sys._base_executable, "-m", "pip", "config", "get", "global.index-url"]  # type: ignore[attr-defined]
        said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        mirror = os.environ.get("PIP_INDEX_URL") or said
        if mirror:
            environment["UV_DEFAULT_INDEX"] = mirror
    subprocess.run([ROOT / ".tools" / "bin" / "uv", "--quiet", *words], env=environment, check=True)
