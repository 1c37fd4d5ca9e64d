"""The `perdure` script before it is there: while it is being imported, Ctrl-C ends it without a word.

Interrupted in the middle of its imports, Python would print a traceback of them. This module stands beside the package,
because a module inside is run only when `import perdure` has ended. `cli.main` takes the signal over.
"""

import os
import signal
from types import FrameType
from typing import NoReturn


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def main() -> NoReturn:
    """Import the command and run it."""
    # A process that was started to ignore it, as `nohup` does, goes on ignoring it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from perdure.cli import main as command

    command()
