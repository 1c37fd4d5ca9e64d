"""The `perdure` command. One file per subcommand; `command.py` knows which there are.

Importing this needs neither click nor rich: they are an extra, and without them one sentence says so.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit. arguments: default the process's own."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored:
        # Ctrl-C before there is anything to interrupt: no traceback of our imports.
        signal.signal(signal.SIGINT, _end)
    try:
        import click  # noqa: F401  # only to see whether it is there
        import rich  # noqa: F401
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich"):
            raise
        print(f"The perdure command needs {missing.name}: pip install 'perdure[cli]'", file=sys.stderr)
        sys.exit(2)
    from perdure.cli.command import run

    if not ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(arguments))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)
