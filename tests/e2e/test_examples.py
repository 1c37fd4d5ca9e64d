"""Every program in `examples/` runs, prints what it should, and runs again over the store it has made."""

from __future__ import annotations

import re
import subprocess
import sys
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
