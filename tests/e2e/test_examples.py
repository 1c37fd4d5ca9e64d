"""Every program in `examples/` runs, prints what it should, and runs again over the store it has made."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests import servers

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
PRINTS: Final = {
    "hello": "HELLO, WORLD!\n",
    "order": "parcel-o-1\n",
    "plain_functions": "12\n",
    "generator": "700\n",
    "children": "7\na book of 7 words\n",
    "transaction": "paid 30, 70 left\nrefused: the account has 70, not 80\n1 of 2 parcels waits\n",
    "cancellation": "released the reservation of room 7: the guest is ill\ncancelled: the guest is ill\n",
}
OF_THE_DEMO: Final = {"demo", "shop", "payments"}


def test_no_example_is_forgotten() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS) | OF_THE_DEMO


@pytest.mark.parametrize("name", PRINTS)
def test_an_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTS[name]
    assert done.stderr == ""


@pytest.mark.parametrize("name", sorted(PRINTS.keys() - {"transaction"}))
def test_an_example_on_postgresql_by_another_url(name: str, tmp_path: Path) -> None:
    database = servers.needed()
    with servers.schema(database) as schema:
        source = (EXAMPLES / f"{name}.py").read_text()
        url = f"{database.url}{'&' if '?' in database.url else '?'}schema={schema}"
        changed, count = re.subn(r'"sqlite:///\w+\.db"', lambda _: repr(url), source)
        assert count == 1, "an example names its store once"
        (tmp_path / f"{name}.py").write_text(changed)
        done = subprocess.run(
            [sys.executable, "-W", "error", f"{name}.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == PRINTS[name]


def test_an_example_with_an_id_started_again_has_ended_already(tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "children.py")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
        assert done.stdout == PRINTS["children"]


def test_the_program_of_the_quick_start_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    text = (EXAMPLES.parent / "docs" / "quickstart.md").read_text()
    (tmp_path / "orders.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    line = [sys.executable, "orders.py"]
    killed = subprocess.Popen(line, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while "step_completed" not in history(tmp_path / "orders.db"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait(60)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert (done.stdout, done.stderr) == ("charged 4200\n", "")
    assert history(tmp_path / "orders.db").count("step_completed") == 1


def history(store: Path) -> str:
    with closing(sqlite3.connect(store)) as db:
        try:
            return "".join(event for (event,) in db.execute("SELECT event FROM perdure_history"))
        except sqlite3.OperationalError:
            return ""  # the tables are being made
