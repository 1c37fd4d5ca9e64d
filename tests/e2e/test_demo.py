"""`make demo`, as it is given to a newcomer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests import servers

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo_charges_each_order_once(tmp_path: Path) -> None:
    charges_each_order_once(tmp_path)


def test_the_same_on_postgresql_by_another_url(tmp_path: Path) -> None:
    database = servers.needed()
    with servers.schema(database) as schema:
        separator = "&" if "?" in database.url else "?"
        charges_each_order_once(tmp_path, f"{database.url}{separator}schema={schema}")


def charges_each_order_once(tmp_path: Path, *url: str) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO), *url], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9" in done.stdout
    charges = re.findall(r"charge \d  (order-\d) +(\d+) cents  after (\d) requests", done.stdout)
    assert sorted((order, cents) for order, cents, _ in charges) == [
        ("order-1", "4200"),
        ("order-2", "990"),
        ("order-3", "12500"),
    ]
    # Two that failed, one that was booked, and after the kill the one that got its answer.
    assert {order: requests for order, _, requests in charges}["order-2"] == "4"
    assert not list(tmp_path.iterdir()), "the demo leaves nothing behind"
