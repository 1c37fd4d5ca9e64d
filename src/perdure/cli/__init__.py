"""The `perdure` command. One file per subcommand; `command.py` knows which there are.

Importing this needs neither click nor rich: they are an extra, and without them one sentence says so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit. arguments: default the process's own."""
    try:
        import click  # noqa: F401  # only to see whether it is there
        import rich  # noqa: F401
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich"):
            raise
        print(f"The perdure command needs {missing.name}: pip install 'perdure[cli]'", file=sys.stderr)
        sys.exit(2)
    from perdure.cli.command import run

    sys.exit(run(arguments))
