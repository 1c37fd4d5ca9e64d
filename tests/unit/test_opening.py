"""From a URL to a store, and what a URL that names none is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perdure.core.errors import NotAStore, StoreError, StoreUnavailable
from perdure.stores.memory import MemoryStore
from perdure.stores.opening import open_store
from perdure.stores.sqlite.store import SQLiteStore


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no PERDURE_STORE."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERDURE_STORE", raising=False)
    return tmp_path


def opened(url: str | None = None) -> SQLiteStore:
    store = open_store(url)
    assert isinstance(store, SQLiteStore)
    store.close()
    return store


def refusal(url: object) -> str:
    with pytest.raises(NotAStore) as caught:
        open_store(url)  # type: ignore[arg-type]  # wrong on purpose
    return str(caught.value)


# --- which one


def test_a_store_object_is_the_store() -> None:
    store = MemoryStore()
    assert open_store(store) is store


def test_what_is_passed_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_STORE", "sqlite:///other.db")
    assert isinstance(open_store("memory://"), MemoryStore)


def test_the_environment_comes_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_STORE", "memory://")
    assert isinstance(open_store(), MemoryStore)


def test_the_default_is_a_file_beside_the_process(folder: Path) -> None:
    opened()
    assert (folder / "perdure.db").is_file()


# --- paths


def test_three_slashes_are_a_relative_path(folder: Path) -> None:
    (folder / "data").mkdir()
    opened("sqlite:///data/orders.db")
    assert (folder / "data" / "orders.db").is_file()


def test_four_slashes_are_an_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    opened(f"sqlite:///{folder}/orders.db")
    assert (folder / "orders.db").is_file()


def test_a_path_may_be_quoted_as_in_any_url(folder: Path) -> None:
    opened("sqlite:///my%20orders%3F.db")
    assert (folder / "my orders?.db").is_file()


def test_a_path_may_hold_a_hash_and_an_at_sign(folder: Path) -> None:
    opened("sqlite:///a#b@c.db")
    assert (folder / "a#b@c.db").is_file()


# --- parameters


@pytest.mark.parametrize("timeout", ["10", "0.5"])
def test_parameters_are_those_of_the_constructor(timeout: str) -> None:
    opened(f"sqlite:///orders.db?busy_timeout={timeout}")


@pytest.mark.parametrize("url", ["sqlite:///orders.db?buzy=1", "sqlite:///orders.db?clock=1", "memory://?size=1"])
def test_an_unknown_parameter_is_named_with_the_known_ones(folder: Path, url: str) -> None:
    text = refusal(url)
    assert f'"{url.partition("?")[2].partition("=")[0]}"' in text
    assert ("busy_timeout" in text) == url.startswith("sqlite")
    assert list(folder.iterdir()) == []


def test_a_parameter_that_cannot_be_read_is_named(folder: Path) -> None:
    assert "busy_timeout=soon" in refusal("sqlite:///orders.db?busy_timeout=soon")
    assert list(folder.iterdir()) == []


def test_a_parameter_that_the_store_refuses_is_told_why(folder: Path) -> None:
    assert "durability='none'" in refusal("sqlite:///orders.db?durability=none")
    assert list(folder.iterdir()) == []


# --- refused by name


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("sqlite:", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://orders.db", "names no file"),
        ("sqlite:orders.db", "names no file"),
        ("sqlite:///:memory:", "write memory://"),
        ("memory:", "write memory://"),
        ("memory://orders", "write memory://"),
        ("orders.db", "has no scheme"),
        ("SQLITE:///orders.db", 'scheme "SQLITE"'),
        ("sqlite:///nowhere/orders.db", "there is no folder"),
        (Path("orders.db"), "is a path"),
    ],
)
def test_a_url_that_names_no_store_is_told_why(folder: Path, url: object, reason: str) -> None:
    assert reason in refusal(url)
    assert list(folder.iterdir()) == []


def test_an_unknown_scheme_is_told_which_exist_and_keeps_its_password() -> None:
    text = refusal("oracle://scott:tiger@host/db")
    assert 'scheme "oracle"' in text
    assert "sqlite, postgresql and memory" in text
    assert "tiger" not in text


def test_an_empty_variable_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_STORE", "")
    assert "PERDURE_STORE" in refusal(None)


# --- PostgreSQL


def test_without_its_driver_a_postgresql_url_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for name in [name for name in sys.modules if name.startswith("perdure.stores.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'perdure[postgres]'" in refusal("postgresql://localhost/orders")


@pytest.mark.parametrize(
    ("query", "named"),
    [("schema=Orders", "schema='Orders'"), ("migrate=never", "migrate='never'"), ("hints=maybe", "hints=maybe")],
)
def test_a_parameter_of_ours_that_cannot_be_is_named(query: str, named: str) -> None:
    assert named in refusal(f"postgresql://localhost:1/orders?{query}")


def test_what_is_no_parameter_of_ours_is_libpqs() -> None:
    with pytest.raises(StoreUnavailable):  # nobody is there, but it was asked
        open_store("postgresql://localhost:1/orders?sslmode=disable&connect_timeout=1")
    assert "knows no parameter colour" in refusal("postgresql://localhost:1/orders?colour=blue")


@pytest.mark.parametrize("url", ["postgresql://u:hunter2@localhost:1/o", "postgres://u@localhost:1/o?password=hunter2"])
def test_a_password_is_never_shown(url: str) -> None:
    for query in ("colour=blue", "migrate=never", "hints=maybe", "connect_timeout=1"):
        joined = f"{url}{'&' if '?' in url else '?'}{query}"
        with pytest.raises(StoreError) as caught:
            open_store(joined)
        assert "hunter2" not in str(caught.value)
        assert "hunter2" not in getattr(caught.value, "store", "")
