"""Who may import whom. The arrows of the design, drawn as tables and kept by reading every import in `src/perdure`.

    core <- stores, runtime <- worker <- client, engine, sync <- shells (cli, server, push, django, dialects, testing)

Only source text is read, nothing is imported: so an import inside a function or under TYPE_CHECKING counts like any
other. A new part of the tree or a new dependency is a line in one of these tables, or a violation.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

PACKAGE: Final = Path(__file__).parents[2] / "src" / "perdure"

# The public names, `import perdure` itself, are a layer of their own: above the engine, below the shells.
PUBLIC: Final = "the public API"
INSIDE: Final = {"core", "stores", "runtime", "worker", "info", "client", "engine", "sync"}

# Layer -> the layers it may import besides itself. A layer is a folder or a module directly inside perdure.
ARROWS: Final[dict[str, set[str]]] = {
    "core": set(),
    "stores": {"core"},
    "runtime": {"core"},
    "worker": {"core", "runtime", "stores"},
    "info": {"core"},
    "client": INSIDE,
    "engine": INSIDE,
    "sync": INSIDE,
    "solitary": INSIDE,
    PUBLIC: INSIDE,
    "cli": {*INSIDE, PUBLIC, "testing"},
    "server": {*INSIDE, PUBLIC},
    "push": {*INSIDE, PUBLIC},
    "django": {*INSIDE, PUBLIC},
    "testing": {*INSIDE, PUBLIC},
    "dialects": {PUBLIC, "sync"},
    "__main__": {"cli"},
}

# Standard library that decides nothing by itself: no I/O, clock, randomness, threads, loop or environment.
PURE: Final = {
    *("__future__", "abc", "annotationlib", "base64", "binascii", "bisect", "builtins", "calendar", "collections"),
    *("contextlib", "copy"),
    *("dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "graphlib", "hashlib"),
    *("heapq", "hmac", "inspect", "ipaddress", "itertools", "json", "keyword", "math", "numbers", "operator"),
    *("pprint", "re", "reprlib", "string", "struct", "sys", "textwrap", "traceback", "types", "typing"),
    *("unicodedata", "uuid", "weakref", "zlib", "zoneinfo"),
}
# … and exception types, which are facts wherever they live, and one pure function.
PURE_NAMES: Final = {"asyncio.CancelledError", "asyncio.TimeoutError", "shlex.quote"}
# … and the doors to clock, randomness and I/O that these modules have all the same.
IMPURE: Final = {
    *("datetime.now", "datetime.today", "datetime.utcnow", "date.today"),
    *("uuid.uuid1", "uuid.uuid4", "uuid.getnode"),
    *("sys.argv", "sys.stdin", "sys.stdout", "sys.stderr"),
}
IMPURE_BUILTINS: Final = {"open", "input", "print"}

# Dependency -> where it may be imported; "" is everywhere.
DEPENDENCIES: Final[dict[str, tuple[str, ...]]] = {
    "msgspec": ("",),
    "cronsim": ("",),
    "typing_extensions": ("",),
    "click": ("perdure.cli",),
    "rich": ("perdure.cli",),
    "psycopg": ("perdure.stores.postgres",),
    "psycopg_pool": ("perdure.stores.postgres",),
    "redis": ("perdure.stores.redis",),
    "django": ("perdure.django",),
    "starlette": ("perdure.server",),
    "uvicorn": ("perdure.server",),
    "jinja2": ("perdure.server",),
    "httpx2": ("perdure.push", "perdure.stores.remote", "perdure.testing"),
    "jwt": ("perdure.push",),
    "pytest": ("perdure.testing",),
}
# Young modules, unknown to the `sys.stdlib_module_names` of an older Python that reads the same source.
STDLIB: Final = {*sys.stdlib_module_names, "annotationlib", "compression", "tomllib"}


class Import(NamedTuple):
    line: int
    name: str  # absolute; `from a import b` is "a.b", whether b is a module or a name in it


def test_imports_point_down() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    assert sources, f"no Python files under {PACKAGE}"
    found = [line for path, text in sources.items() for line in violations(path.relative_to(PACKAGE), text)]
    assert not found, "\n".join([f"{len(found)} arrows point the wrong way:", *found])


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("core/turn.py", "import asyncio", "1: core is pure and may not import asyncio"),
        ("core/turn.py", "import msgspec\nfrom os import path", "2: core is pure and may not import os.path"),
        ("core/turn.py", "def f():\n    import random", "2: core is pure and may not import random"),
        ("core/turn.py", "from ..stores import contract", "1: core may not import stores"),
        ("core/turn.py", "from perdure import Status", "1: core may not import the public API"),
        ("core/turn.py", "now = datetime.now(UTC)", "1: core is told such things: datetime.now"),
        ("core/turn.py", "import datetime as dt\ndt.date.today()", "2: core is told such things: date.today"),
        ("core/ids.py", "from uuid import uuid4", "1: core is told such things: uuid.uuid4"),
        ("core/turn.py", "print('here')", "1: core is told such things: print"),
        ("stores/memory.py", "import perdure.worker.lease", "1: stores may not import worker"),
        ("stores/__init__.py", "from ..runtime import play", "1: stores may not import runtime"),
        ("runtime/play.py", "from perdure.stores import memory", "1: runtime may not import stores"),
        ("runtime/play.py", "if TYPE_CHECKING:\n  import perdure.engine", "2: runtime may not import engine"),
        ("worker/lease.py", "from perdure import client", "1: worker may not import client"),
        ("worker/lease.py", "import_module('perdure.cli')", "1: worker may not import cli"),
        ("engine.py", "from .testing import sim", "1: engine may not import testing"),
        ("server/app.py", "from perdure.push import webhook", "1: server may not import push"),
        ("dialects/redflow.py", "import perdure.core.ids", "1: dialects may not import core"),
        ("worker/worker.py", "import rich.table", "1: rich is imported only in perdure.cli"),
        ("stores/sqlite/store.py", "import numpy", "1: numpy is no dependency we chose"),
        ("helpers.py", "import re", "1: perdure.helpers is in no layer: give it one in test_layers.py"),
        ("__init__.py", "from perdure.cli import main", "1: the public API may not import cli"),
        ("__init__.py", "import sys\nDEBUG = sys.flags.dev_mode", "2: perdure/__init__.py holds imports only"),
    ],
)
def test_a_wrong_arrow_is_named_with_its_line(path: str, source: str, complaint: str) -> None:
    assert violations(Path(path), source) == [f"{path}:{complaint}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/turn.py", "from datetime import datetime\nfrom .ids import RunId\nfrom perdure.core import retry"),
        ("core/errors.py", "from asyncio import CancelledError as Cancelled"),
        ("core/status.py", "if __name__ == '__main__':\n    print(MOVES)"),
        ("core/turn.py", "import msgspec, uuid\nlater = lambda now: now.astimezone()\nuuid.UUID(int=0)"),
        ("stores/sqlite/store.py", "import sqlite3, time\nfrom ...core.events import Event\nfrom .. import contract"),
        ("worker/worker.py", "import asyncio, signal\nfrom perdure.runtime import play\nfrom ..stores import opening"),
        ("engine.py", "from .client import Client\nfrom .worker.worker import Worker"),
        ("cli/show.py", "import click, rich\nfrom perdure import Client\nfrom perdure.testing import sim\nprint()"),
        ("dialects/hookflow/__init__.py", "import perdure\nfrom perdure import Engine\nfrom perdure import sync"),
        ("__init__.py", '"""The public names."""\nfrom .engine import Engine as Engine\n__all__ = ["Engine"]'),
    ],
)
def test_a_right_arrow_is_silent(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def violations(path: Path, source: str) -> list[str]:
    """What is wrong with one file's imports, as "file:line: sentence", by line.

    path: the file's place inside the package.
    """
    tree = ast.parse(source, filename=str(path))
    layer = PUBLIC if path == Path("__init__.py") else path.parts[0].removesuffix(".py")
    if layer not in ARROWS:
        return [f"{path}:1: perdure.{layer} is in no layer: give it one in test_layers.py"]
    found: list[tuple[int, str]] = []
    for line, name in imports(tree, path):
        if (complaint := judged(layer, module_of(path), name)) is not None:
            found.append((line, complaint))
    if layer == "core":
        found += [(line, f"core is told such things: {name}") for line, name in impurities(tree)]
    if layer == PUBLIC:
        found += [(line, "perdure/__init__.py holds imports only") for line in logic(tree)]
    # A set, as `from os import path, sep` is two imports on one line with one fault each at most.
    return [f"{path.as_posix()}:{line}: {complaint}" for line, complaint in sorted(set(found))]


def judged(layer: str, module: str, name: str) -> str | None:
    """What is wrong when `module`, a part of `layer`, imports `name`; None if nothing is."""
    top, _, rest = name.partition(".")
    if top == "perdure":
        # `from perdure import client` means the module, `from perdure import Engine` the public name.
        below = rest.partition(".")[0]
        target = below if below in ARROWS else PUBLIC
        return None if target == layer or target in ARROWS[layer] else f"{layer} may not import {target}"
    if top in DEPENDENCIES:
        places = DEPENDENCIES[top]
        allowed = any(not place or f"{module}.".startswith(f"{place}.") for place in places)
        return None if allowed else f"{top} is imported only in {', '.join(places)}"
    if top not in STDLIB:
        return f"{top} is no dependency we chose"
    if layer == "core" and top not in PURE and name not in PURE_NAMES:
        return f"core is pure and may not import {name}"
    return None


def imports(tree: ast.Module, path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands, with relative ones made absolute."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                if level:
                    package = ["perdure", *path.parts[:-1]]
                    source = ".".join([*package[: len(package) - level + 1], *([source] if source else [])])
                yield from (Import(node.lineno, f"{source}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(node.lineno, name)


def impurities(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Uses of the clock, of randomness and of I/O that need no forbidden import."""
    for node in ast.walk(ast.Module([part for part in tree.body if not is_main(part)], [])):
        match node:
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=attr):
                if f"{owner}.{attr}" in IMPURE:
                    yield node.lineno, f"{owner}.{attr}"
            case ast.ImportFrom(module=str(owner), names=names):
                for alias in names:
                    if f"{owner}.{alias.name}" in IMPURE:
                        yield node.lineno, f"{owner}.{alias.name}"
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_BUILTINS:
                yield node.lineno, name


def is_main(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":` is no part of the module: there a table of the core may print itself."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def logic(tree: ast.Module) -> Iterator[int]:
    """Lines of a table of contents that are neither docstring, import, nor a constant such as `__all__`."""
    for node in tree.body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
                continue
            case ast.If(test=ast.Name("TYPE_CHECKING"), body=body, orelse=[]) if all(
                isinstance(each, (ast.Import, ast.ImportFrom)) for each in body
            ):
                continue
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                try:
                    ast.literal_eval(value)
                except ValueError:
                    yield node.lineno
            case _:
                yield node.lineno


def module_of(path: Path) -> str:
    """The dotted name of a file inside the package."""
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return ".".join(["perdure", *parts])
