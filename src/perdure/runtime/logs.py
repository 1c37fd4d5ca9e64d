"""`ctx.log` and `current_step().log`: loggers whose lines begin with whom they speak of."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from perdure.core.match import Line

_run: Final = logging.getLogger("perdure.run")
_step: Final = logging.getLogger("perdure.step")


class _Named(str):
    """A message behind a name, which is no part of its format: ids may hold a `%`."""

    __slots__ = ("_message", "_name")

    _name: str
    _message: Any

    def __new__(cls, name: str, message: Any) -> _Named:
        made = super().__new__(cls, f"{name} {message}")
        made._name, made._message = name, message
        return made

    def __str__(self) -> str:  # else `logging` would make it an ordinary str before it formats it
        return self

    def __mod__(self, arguments: Any) -> str:
        return f"{self._name} {str(self._message) % arguments}"


class RunLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """A logger that is silent during replay and names the run."""

    def __init__(self, line: Line) -> None:
        super().__init__(_run, {})
        self._line = line

    def isEnabledFor(self, level: int) -> bool:
        return not self._line.replaying and not self._line.dead and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return _Named(f"[{self._line.run_id}]", msg), kwargs


class StepLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """A logger that names the run and the step, also as attributes of its records."""

    def __init__(self, run: str, step: str) -> None:
        super().__init__(_step, {"run": run, "step": step})
        self._name = f"[{run} {step}]"

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        msg, kwargs = super().process(msg, kwargs)
        return _Named(self._name, msg), kwargs
