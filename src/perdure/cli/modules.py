"""MODULE on the command line: a module's name or a path to a `.py` file; the current folder can be imported from."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from perdure.cli.words import NoSuch, Wrong
from perdure.runtime.registry import Activity, Workflow


def load(name: str) -> ModuleType:
    """The module; Wrong with the last line of what it raised, and what to do about it."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if name.endswith(".py") or os.sep in name:
            return _from_file(Path(name))
        return importlib.import_module(name)
    except Wrong:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may also call sys.exit()
        raise Wrong(f"{name} cannot be imported. {_last_line(error)}. {_mended_by(name, error)}") from error


def workflows_in(module: ModuleType) -> list[Workflow[Any, Any]]:
    """The workflows a module holds, in the order in which it names them."""
    return list(dict.fromkeys(value for value in vars(module).values() if isinstance(value, Workflow)))


def load_served(name: str) -> ModuleType:
    """A module with something to serve."""
    before, colon, after = name.rpartition(":")
    if colon and after.isidentifier():
        raise Wrong(f"{name} names one workflow. Whole modules are served: write {before}.")
    module = load(name)
    if not any(isinstance(value, (Workflow, Activity)) for value in vars(module).values()):
        raise Wrong(
            f"{name} holds no workflows. A workflow is a function decorated with @workflow. "
            "Decorate one, or name the module that has it."
        )
    return module


def load_workflow(target: str) -> tuple[ModuleType, Workflow[Any, Any]]:
    """MODULE:WORKFLOW: the module, and the workflow by its own name or by the variable that holds it."""
    name, colon, wanted = target.rpartition(":")
    if not colon or not name or not wanted:
        module = load_served(wanted or name)
        names = [each.name for each in workflows_in(module)]
        raise Wrong(
            f"{target} names no workflow. It is written MODULE:WORKFLOW, for example "
            f"{(wanted or name)}:{names[0] if names else 'order'}."
        )
    module = load_served(name)
    found = workflows_in(module)
    for workflow in found:
        if workflow.name == wanted:
            return module, workflow
    value = getattr(module, wanted, None)
    if isinstance(value, Workflow):
        return module, value
    if value is not None:
        raise Wrong(f"{wanted} in {name} is no workflow. Decorate it with @workflow, or name another.")
    raise NoSuch(f"{name} has no workflow {wanted}. It has: {', '.join(each.name for each in found)}.")


def queues_of(module: ModuleType) -> list[str]:
    """Every queue that something in the module asks for."""
    served = [value for value in vars(module).values() if isinstance(value, (Workflow, Activity))]
    return list(dict.fromkeys(["default", *(each.queue for each in served if each.queue is not None)]))


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise Wrong(f"There is no file {path}. MODULE is a module's name or a path to a .py file.")
    name = path.stem
    there = sys.modules.get(name)
    if there is not None:
        if getattr(there, "__file__", None) == str(path.resolve()):
            return there
        # `queue.py` in a user's folder is not the `queue` that is loaded.
        name = f"perdure_file_{name}"
    # As `python FILE` does, so that the file can import its neighbours.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise Wrong(f"{path} is no Python file. MODULE is a module's name or a path to a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _mended_by(name: str, error: BaseException) -> str:
    """What to do about a module that cannot be imported."""
    if not isinstance(error, ModuleNotFoundError):
        return "Mend the module and give the command again."
    if error.name is not None and f"{name}.".startswith(f"{error.name}."):
        return f"Give the command in the folder that has {error.name}, or the path to its .py file."
    return "Install that module where perdure is installed, or mend the import."


def _last_line(error: BaseException) -> str:
    """What was raised, and the last line of the user's own code that did it."""
    said = traceback.format_exception_only(type(error), error)[-1].strip()
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    if isinstance(error, SyntaxError):
        return f"{said} ({error.filename}, line {error.lineno})"
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said
