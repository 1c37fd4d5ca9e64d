"""What `@workflow` and `@activity` make, and the table of what a process serves.

Decorating registers nothing: an engine or worker serves what it is given, objects or whole modules. Two of one
name are an error that names both places.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator, Iterable
from datetime import timedelta
from types import ModuleType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from perdure.core.limits import check_name
from perdure.core.retry import Retry, duration, exception_types, retry_given
from perdure.core.signature import Parameter, Signature, result_plan, signature_of

P = ParamSpec("P")
R = TypeVar("R")

Style = Literal["async", "sync", "generator"]


def place_of(fn: Any) -> str:
    """`file:line` where a function or class was written, for error texts."""
    target = inspect.unwrap(fn)
    code = getattr(target, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', target)}"


def style_of(fn: Callable[..., Any]) -> Style:
    """How a workflow function is driven."""
    if inspect.iscoroutinefunction(fn):
        return "async"
    if inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"{fn.__qualname__} is an async generator ({place_of(fn)}). A workflow is an async function, a plain "
            "function or a plain generator. Use `await` instead of `yield`."
        )
    return "generator" if inspect.isgeneratorfunction(fn) else "sync"


class Workflow(Generic[P, R]):
    """A workflow: still callable as `wf(ctx, …)`; `.fn` is the original, `.name` what it is stored under."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        queue: str = "default",
        timeout: timedelta | float | None = None,
        retry: Retry | None = None,
        on_failure: Callable[..., Any] | None = None,
    ) -> None:
        given: Any = fn  # Callers are not all type-checked.
        if isinstance(given, type) or not callable(given) or not hasattr(given, "__qualname__"):
            raise TypeError(
                f"@workflow got {fn!r}. A workflow is a function: async, plain, or a generator. Decorate a function; "
                "one made of a class comes with a later version."
            )
        self.fn = fn
        self.name = check_name(name if name is not None else fn.__name__, "the name of a workflow")
        self.queue = check_name(queue, "queue=")
        self.timeout = None if timeout is None else duration(timeout, "timeout=", zero=False)
        if on_failure is not None or (retry is not None and retry_given(retry, "retry=").max_attempts != 1):
            raise ValueError(
                f"@workflow(on_failure=…) and a second attempt of a whole run come with a later version (given for "
                f"{self.name}). A run has one attempt now, its steps have their own Retry. Catch StepFailed in the "
                "workflow to clean up."
            )
        self.retry = retry if retry is not None else Retry(max_attempts=1)
        self.style: Style = style_of(fn)
        self.place = place_of(fn)
        self.signature = signature_of(fn, name=self.name)
        self.bare = not self.signature.parameters
        if self.bare:
            # Its one argument is `ctx.input`.
            self.signature = Signature(self.name, [Parameter("input", "only", required=False)])
        self.returns = result_plan(fn)
        self.__name__ = fn.__name__
        self.__qualname__ = fn.__qualname__
        self.__module__ = fn.__module__
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def __call__(self, ctx: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self.fn(ctx, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name} ({self.place})>"


class Activity(Generic[P, R]):
    """A step's function with its own policy; still callable, `.fn` is the original."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        queue: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | float | None = None,
        total_timeout: timedelta | float | None = None,
        raises: tuple[type[BaseException], ...] | type[BaseException] = (),
    ) -> None:
        given: Any = fn  # Callers are not all type-checked.
        if isinstance(given, type) or not callable(given) or not hasattr(given, "__qualname__"):
            raise TypeError(
                f"@activity got {fn!r}. An activity is a function, async or plain. Decorate a function; settings go by "
                "name: @activity(retry=…)."
            )
        self.fn = fn
        self.name = check_name(name if name is not None else fn.__name__, "the name of an activity")
        self.queue = None if queue is None else check_name(queue, "queue=")
        self.retry = retry_given(retry, "retry=") if retry is not None else Retry()
        self.timeout = None if timeout is None else duration(timeout, "timeout=", zero=False)
        self.total_timeout = None if total_timeout is None else duration(total_timeout, "total_timeout=", zero=False)
        self.raises = exception_types(raises, "raises=")
        self.place = place_of(fn)
        self.signature = signature_of(fn, name=self.name, context=False)
        self.returns = result_plan(fn)
        self.__name__ = fn.__name__
        self.__qualname__ = fn.__qualname__
        self.__module__ = fn.__module__
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self.fn(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.fn.__get__(instance, owner)

    def __repr__(self) -> str:
        return f"<activity {self.name} ({self.place})>"


class _WorkflowDecorator(Protocol):
    """What `@workflow(...)` gives: the same three forms."""

    @overload
    def __call__(self, fn: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[Any, P], Generator[Any, Any, R]], /) -> Workflow[P, R]: ...
    @overload
    def __call__(self, fn: Callable[Concatenate[Any, P], R], /) -> Workflow[P, R]: ...


@overload
def workflow(fn: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
@overload
def workflow(fn: Callable[Concatenate[Any, P], Generator[Any, Any, R]], /) -> Workflow[P, R]: ...
@overload
def workflow(fn: Callable[Concatenate[Any, P], R], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *,
    name: str | None = None,
    queue: str = "default",
    timeout: timedelta | float | None = None,
    retry: Retry | None = None,
    on_failure: Callable[..., Any] | None = None,
) -> _WorkflowDecorator: ...
def workflow(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function a workflow: `@workflow`, or `@workflow(name=…, queue=…, timeout=…)`.

    The function's first parameter is the context; the others are the run's input. One that has no others may be given
    one argument all the same, which is `ctx.input`. `async def`, `def` and
    generator functions work alike. name: default the function's own. timeout: the longest a run may take, a
    timedelta or seconds; a run that takes longer ends as `timed_out`, without its code being asked.
    Nothing is registered: give the result to an `Engine` or `Worker`.
    """
    return _decorated(Workflow, fn, options)


class _ActivityDecorator(Protocol):
    """What `@activity(...)` gives: the same two forms."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Activity[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Activity[P, R]: ...


@overload
def activity(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Activity[P, R]: ...
@overload
def activity(fn: Callable[P, R], /) -> Activity[P, R]: ...
@overload
def activity(
    *,
    name: str | None = None,
    queue: str | None = None,
    retry: Retry | None = None,
    timeout: timedelta | float | None = None,
    total_timeout: timedelta | float | None = None,
    raises: tuple[type[BaseException], ...] | type[BaseException] = (),
) -> _ActivityDecorator: ...
def activity(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Give a step's function its own policy: `@activity`, or `@activity(retry=Retry(…), timeout=30)`.

    name: default the function's own. queue: default None, it runs where the workflow runs; with one it is dispatched to
    workers of that queue. retry: default `Retry()`, 3 attempts. timeout: one attempt, seconds or timedelta.
    total_timeout: all attempts and the waits between them. Neither has a bound by default.
    raises: exception types that a workflow wants to catch by their own name; default none, built-in ones are anyway.
    Nothing is registered. TypeError or ValueError for a setting that is none.
    """
    return _decorated(Activity, fn, options)


def _decorated(kind: Callable[..., Any], fn: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    if options:
        # At the decorator's own line: it may be used somewhere else.
        try:
            inspect.signature(kind).bind_partial(fn, **options)
        except TypeError as error:
            raise TypeError(f"@{kind.__name__.lower()}: {error}") from None
    decorate = functools.partial(kind, **options)
    return decorate if fn is None else decorate(fn)


class Registry:
    """What one process serves, by name."""

    def __init__(
        self,
        workflows: Iterable[Workflow[Any, Any] | ModuleType] = (),
        activities: Iterable[Activity[Any, Any] | ModuleType] = (),
    ) -> None:
        self.workflows: dict[str, Workflow[Any, Any]] = {}
        self.activities: dict[str, Activity[Any, Any]] = {}
        for given in several(workflows, "workflows="):
            self._add(given, "workflows=")
        for given_activity in several(activities, "activities="):
            self._add(given_activity, "activities=")

    def _add(self, given: Any, what: str) -> None:
        if isinstance(given, ModuleType):
            for value in vars(given).values():
                if isinstance(value, Workflow):
                    _put(self.workflows, value, "workflow")
                elif isinstance(value, Activity):
                    _put(self.activities, value, "activity")
        elif isinstance(given, Workflow):
            _put(self.workflows, given, "workflow")
        elif isinstance(given, Activity):
            _put(self.activities, given, "activity")
        else:
            raise TypeError(
                f"{what} got {given!r}. It takes functions decorated with @workflow or @activity, or modules that hold "
                "some. Decorate the function, or pass its module."
            )


def several(given: Any, what: str) -> list[Any]:
    """`given` as a list; a TypeError that says so where it is a single thing."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        shown = "" if given is None else getattr(given, "__name__", None) or repr(given)
        raise TypeError(
            f"{what} got {given!r}. It takes several, also where there is only one. Pass a list: {what}[{shown}]."
        )
    return list(given)


def _put(table: dict[str, Any], value: Any, what: str) -> None:
    there = table.setdefault(value.name, value)
    if there is not value:
        raise ValueError(
            f'Two {what} definitions are called "{value.name}": {there.place} and {value.place}. '
            "A name is what a run is stored under, so each belongs to one definition. "
            f"Give one of them another: @{what}(name=…)."
        )
