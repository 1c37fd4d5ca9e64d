"""The group of subcommands, each imported when it is asked for, and what each error means to a shell."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from perdure.cli.words import complain
from perdure.core.errors import (
    NotAStore,
    PerdureError,
    Refused,
    RunEnded,
    RunFinished,
    RunNotFound,
    StoreError,
    UnknownWorkflow,
)

DONE: Final = 0
NO_SUCCESS: Final = 1
WRONG: Final = 2
NOT_FOUND: Final = 3
STORE: Final = 4
TOO_LONG: Final = 5
INTERRUPTED: Final = 130

# Name, which is also the module's, and what `perdure --help` says. A module has its command as `command`.
COMMANDS: Final = {
    "run": "Run a workflow here, to its end, and show its steps as they happen.",
    "worker": "Serve the workflows of some modules until SIGTERM.",
    "start": "Start a run that a worker executes, and print its id.",
    "list": "List runs, newest first.",
    "show": "Show one run with its steps, attempts, waits and times.",
    "history": "Print a run's events, oldest first.",
    "result": "Wait for a run's end and print its result.",
    "signal": "Send a signal to a run.",
    "cancel": "Ask a run's code to stop.",
    "terminate": "End a run without asking its code.",
    "why": "Say in one sentence what a run waits for, since when, and who could move it.",
    "prune": "Remove runs that ended long ago, with everything that is kept of them.",
    "db": "Say which migrations a store has, and apply those that are missing.",
    "sim": "Run the seeded simulation of the engine.",
}

EPILOG: Final = """\b
Exit codes:
    0  done
    1  the run ended without success
    2  wrong usage or input
    3  no such run or workflow
    4  the store
    5  waited too long
  130  interrupted
Results go to stdout, everything else to stderr."""


class Commands(click.Group):
    """Subcommands that are files beside this one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if Path(__file__).with_name(f"{name}.py").exists()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        found = importlib.import_module(f"perdure.cli.{cmd_name}").command
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Not click's own: it would import every subcommand for its first line.
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])


def _version(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        click.echo(version("perdure"))
        ctx.exit()


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def perdure() -> None:
    """Durable workflows: run them, ask about them, move them.

    The store is --store, else the variable PERDURE_STORE, else sqlite:///perdure.db in this folder.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; the exit code."""
    try:
        code = perdure.main(arguments, prog_name="perdure", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KeyboardInterrupt:
        complain("Interrupted.")
        return INTERRUPTED
    except OSError as error:
        # Whoever read our output may have left, and is not told so.
        if not isinstance(error, BrokenPipeError):
            complain(f"The output could not be written: {error.strerror or error}.")
        # Python would complain once more at exit, when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_SUCCESS


def exit_code(error: PerdureError | TimeoutError) -> int:
    """What an error means to a shell."""
    match error:
        case RunEnded() | RunFinished():
            return NO_SUCCESS
        case TimeoutError():
            return TOO_LONG
        case RunNotFound() | UnknownWorkflow():
            return NOT_FOUND
        case NotAStore(store=""):
            return WRONG  # the URL names no store; one that names something else has it in `store`
        case StoreError():
            return STORE
        case Refused():
            return WRONG
        case _:
            return NO_SUCCESS
