"""What stands behind each durable operation: how it was asked for, how its record becomes a value or an error.

`asked(...)` functions build an `Op` from a call of `ctx.step`; the two faces (`context.py`) only differ in how
they wait for it. The specs here are the runtime's half of an `Op`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, replace
from datetime import timedelta
from types import FunctionType, MethodType
from typing import Any, Final
from weakref import ref

import msgspec
from msgspec import Raw

from perdure.core import codec, failure
from perdure.core import events as ev
from perdure.core.codec import Plan, plan
from perdure.core.errors import timed_out
from perdure.core.limits import ID_LENGTH, Limits, check_name
from perdure.core.match import Op
from perdure.core.retry import Retry
from perdure.core.signature import ANY_CALL, result_plan
from perdure.runtime.registry import Activity, Workflow

DEFAULT_RETRY: Final = Retry()
ANYTHING: Final = plan()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `ctx.step.options(...)` sets, in front of the user's own arguments; None: as declared, else the default."""

    retry: Retry | None = None
    timeout: timedelta | None = None
    total_timeout: timedelta | None = None
    returns: Any = None
    raises: tuple[type[BaseException], ...] | None = None
    queue: str | None = None
    id: str | None = None
    parent_close: str | None = None
    idempotency_key: str | None = None

    def with_(self, **changes: Any) -> Options:
        return replace(self, **changes)


NO_OPTIONS: Final = Options()


class Policy:
    """How a step's function is tried, and how its outcome is read: the same for every call of it without options."""

    # Not the function itself: what is remembered of it must not keep it.
    __slots__ = ("__weakref__", "name", "on_loop", "raises", "retry", "returns", "timeout", "total_timeout")

    def __init__(self, fn: Any, options: Options) -> None:
        own: Any = fn if isinstance(fn, Activity) else _Plain
        self.on_loop = is_async(fn.fn if isinstance(fn, Activity) else fn)
        self.name = name_of(fn)
        self.retry: Retry = options.retry or own.retry
        self.timeout: timedelta | None = options.timeout if options.timeout is not None else own.timeout
        self.total_timeout: timedelta | None = (
            options.total_timeout if options.total_timeout is not None else own.total_timeout
        )
        self.raises: tuple[type[BaseException], ...] = options.raises if options.raises is not None else own.raises
        if options.returns is not None:
            self.returns = plan(options.returns, what="returns=")
        else:
            self.returns = fn.returns if isinstance(fn, Activity) else result_plan(fn)


class _Plain:
    """What a function has that was not declared as an activity."""

    retry = DEFAULT_RETRY
    timeout = None
    total_timeout = None
    raises: tuple[type[BaseException], ...] = ()


_policies: Final[dict[ref[Any], Policy]] = {}


def policy_of(fn: Any, options: Options) -> Policy:
    """The policy of a step's function; remembered for functions and activities that are called without options."""
    if options is not NO_OPTIONS or type(fn) not in (FunctionType, Activity):
        return Policy(fn, options)
    known = _policies.get(ref(fn))
    if known is None:
        known = _policies[ref(fn, _forget)] = Policy(fn, options)
    return known


def _forget(fn: ref[Any]) -> None:
    _policies.pop(fn, None)


class LocalCall:
    """A step's function with its arguments and policy, to be executed in this process."""

    __slots__ = ("args", "context", "fn", "kwargs", "limits", "policy")

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], policy: Policy, limits: Limits
    ) -> None:
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.policy = policy
        self.limits = limits
        self.context = copy_context()

    def encode(self, value: Any, step: str) -> tuple[bytes, Any]:
        """The stored result of the function, and what the code will see of it."""
        limits = self.limits
        plan = self.policy.returns
        return plan.quickly(value, limits) or plan.roundtrip(value, f'the result of step "{step}"', limits)

    def decode(self, raw: Raw) -> Any:
        return self.policy.returns.decode(bytes(raw), "the step's result")

    def fail(self, step: str, event: Any) -> BaseException:
        return failure.raised(event.error, step, self.policy.raises, attempts=event.attempt)


class Length:
    """A sleep or a wait: how long it lasts, or until when."""

    __slots__ = ("due", "length", "returns")

    def __init__(self, *, length: int | None = None, due: int | None = None, returns: Plan = ANYTHING) -> None:
        self.length = length
        self.due = due
        self.returns = returns

    def decode(self, raw: Raw) -> Any:
        """A signal's value: the one argument, None without any, a list of several."""
        return self.returns.decode(bytes(raw), "the signal")

    def fail(self, step: str, event: Any) -> BaseException:
        return timed_out(
            f'The wait "{step}" ended without a signal. None came before its timeout. '
            "Catch TimeoutError to go on without it, or give it a longer timeout."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivityPolicy:
    """How a dispatched activity is tried; its worker has the same function, perhaps with another policy."""

    retry: Retry
    timeout: timedelta | None
    total_timeout: timedelta | None


class RemoteCall:
    """A child run or a dispatched activity: what the start needs beyond the command, and how its end is read.

    elsewhere: its code is not here, and what it was given no queue and no timeout for is what was announced.
    """

    __slots__ = ("elsewhere", "idempotency_key", "policy", "raises", "returns", "run", "timeout")

    def __init__(
        self,
        *,
        returns: Plan,
        raises: tuple[type[BaseException], ...] = (),
        timeout: timedelta | None = None,
        policy: Any = None,
        run: str = "",
        idempotency_key: str | None = None,
        elsewhere: bool = False,
    ) -> None:
        self.elsewhere = elsewhere
        self.returns = returns
        self.raises = raises
        self.timeout = timeout
        self.policy = policy
        self.run = run
        self.idempotency_key = idempotency_key

    def decode(self, raw: Raw) -> Any:
        return self.returns.decode(bytes(raw), "the result")

    def fail(self, step: str, event: Any) -> BaseException:
        error = event.error
        if isinstance(event, ev.ChildEnded):
            if error is None:
                error = failure.RecordedError(type="", message=f"It ended as {event.status}.")
            error = msgspec.structs.replace(error, kind="child", status=event.status, run_id=event.run or self.run)
        return failure.raised(error, step, self.raises, attempts=event.attempts)


"""How the input of a workflow is written whose code is elsewhere."""


def call_site(depth: int) -> str:
    """`folder/file.py:line` of the caller `depth` frames up: evidence for reports, never compared."""
    frame = sys._getframe(depth)
    return f"{short(frame.f_code.co_filename)}:{frame.f_lineno}"


def is_async(fn: Any) -> bool:
    """Whether calling this gives a coroutine, as far as can be seen from outside."""
    target = fn
    while isinstance(target, functools.partial):
        target = target.func
    target = getattr(target, "__func__", target)
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004


@functools.lru_cache(maxsize=4096)
def short(path: str) -> str:
    """A source file as people name it: relative to the working directory if below it, else its last two parts."""
    try:
        relative = os.path.relpath(path)
    except ValueError:
        relative = os.pardir
    if relative.startswith(os.pardir):
        return "/".join(path.replace(os.sep, "/").split("/")[-2:])
    return relative.replace(os.sep, "/")


def name_of(fn: Any) -> str | None:
    """What a step's function is called in the record; None (matches any) for lambdas and nameless callables."""
    name = fn.name if isinstance(fn, Activity) else getattr(fn, "__name__", None)
    return None if name is None or name == "<lambda>" else str(name)


def child_id(parent: str, step: str) -> str:
    """`parent/step`; past 255 characters the tail is a hash of the whole, so that it stays unique."""
    whole = f"{parent}/{step}"
    if len(whole) <= ID_LENGTH:
        return whole
    digest = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()
    return f"{whole[: ID_LENGTH - len(digest) - 1]}~{digest}"


def check_call(what: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that the function cannot take: it would be tried again and again in vain.

    Judged by the function's own code, not by what it wraps or says of itself: a decorator may give it more. What has
    no code of its own (a partial, a class, a builtin) is not judged.
    """
    target, count = function, len(args)
    if type(target) is MethodType:
        target, count = target.__func__, count + 1
    if type(target) is not FunctionType:
        return
    code = target.__code__
    most = code.co_argcount
    required = most - len(target.__defaults__ or ())
    rest = code.co_flags & inspect.CO_VARARGS
    if kwargs or code.co_kwonlyargcount or not required <= count or not (count <= most or rest):
        wrong = _misfit(target, count, kwargs)
        if wrong:
            names = ", ".join(code.co_varnames[: most + code.co_kwonlyargcount]) or "nothing"
            raise TypeError(
                f"{what} got arguments that {name_of(function) or 'its function'} cannot take: {wrong} (it takes "
                f"{names}). What comes after the function is passed to it as it is; settings go into "
                "ctx.step.options(…)."
            )


def _misfit(function: FunctionType, count: int, kwargs: dict[str, Any]) -> str:
    """What is wrong with so many arguments by position and these by name; "" if nothing is."""
    code = function.__code__
    most, only = code.co_argcount, code.co_posonlyargcount
    positional = code.co_varnames[:most]
    named = code.co_varnames[most : most + code.co_kwonlyargcount]
    if count > most and not code.co_flags & inspect.CO_VARARGS:
        return f"{count} by position are {count - most} too many"
    for name in kwargs:
        if name in positional[only:]:
            if positional.index(name) < count:
                return f"{name!r} is given twice"
        elif name not in named and not code.co_flags & inspect.CO_VARKEYWORDS:
            return f"there is no {name!r} to be given by name"
    required = most - len(function.__defaults__ or ())
    missing = [
        name for at, name in enumerate(positional[:required]) if at >= count and (at < only or name not in kwargs)
    ]
    missing += [name for name in named if name not in kwargs and name not in (function.__kwdefaults__ or ())]
    return f"{', '.join(map(repr, missing))} is missing" if missing else ""


def _for_children_only(what: str, options: Options) -> None:
    for name in ("id", "parent_close", "idempotency_key"):
        if getattr(options, name) is not None:
            raise TypeError(
                f"{what} was given {name}=, which is a setting of children. A step has no run of its own. Leave it "
                "out, or start a workflow with ctx.step.run_workflow."
            )


def local(
    id: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, limits: Limits, site: str
) -> Op:
    """A step that runs here."""
    if type(fn) is not FunctionType and isinstance(fn, Workflow):
        raise TypeError(
            f'ctx.step.run("{id}", …) got the workflow {fn.name}, which is no function of a step. A workflow needs a '
            "run of its own. Start it as a child, with ctx.step.run_workflow."
        )
    if not callable(fn):
        raise TypeError(
            f'ctx.step.run("{id}", …) got {fn!r}, which cannot be called. Its second argument is the function to '
            "run. Pass the function itself, and its arguments after it."
        )
    function = fn.fn if type(fn) is Activity else fn
    check_call(f'ctx.step.run("{id}", …)', function, args, kwargs)
    if options is not NO_OPTIONS:
        _for_children_only(f'ctx.step.run("{id}", …)', options)
        if options.queue is not None:
            raise TypeError(
                f'ctx.step.run("{id}", …) was given a queue, and {name_of(fn) or "a lambda"} is no activity. Only what '
                "has a name of its own can be executed elsewhere. Decorate it with @activity, or leave the queue out."
            )
    policy = policy_of(fn, options)
    call = LocalCall(function, args, kwargs, policy, limits)
    return Op("run", id, name=policy.name, site=site, digest=codec.digest64(args, kwargs), spec=call)


def transaction(
    id: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, limits: Limits, site: str
) -> Op:
    """A step that runs here, in a transaction of the store's own database."""
    if isinstance(fn, Workflow) or not callable(fn):
        raise TypeError(
            f'ctx.step.transaction("{id}", …) got {fn!r}. Its second argument is a plain function, which gets the open '
            "connection first. Pass the function itself, and its further arguments after it."
        )
    if options.queue is not None or (isinstance(fn, Activity) and fn.queue is not None):
        raise TypeError(
            f'ctx.step.transaction("{id}", …) was given a queue. A transaction is one connection of this process, and '
            "cannot be dispatched. Leave the queue out, or use ctx.step.run."
        )
    function = fn.fn if isinstance(fn, Activity) else fn
    if is_async(function):
        raise TypeError(
            f'ctx.step.transaction("{id}", …) got the async function {name_of(fn)}. The transaction holds the '
            "connection, and on SQLite every other writer, until the function returns: nothing may be awaited in it. "
            "Give a plain function; it runs in a thread."
        )
    check_call(f'ctx.step.transaction("{id}", …)', function, ("the connection", *args), kwargs)
    _for_children_only(f'ctx.step.transaction("{id}", …)', options)
    policy = policy_of(fn, options)
    call = LocalCall(function, args, kwargs, policy, limits)
    return Op("transaction", id, name=policy.name, site=site, digest=codec.digest64(args, kwargs), spec=call)


def activity(
    id: str,
    target: Activity[Any, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    limits: Limits,
    site: str,
    parent: str,
) -> Op:
    """A step dispatched to a queue."""
    _for_children_only(f'ctx.step.run("{id}", …)', options)
    spec = RemoteCall(
        returns=target.returns if options.returns is None else plan(options.returns, what="returns="),
        raises=target.raises if options.raises is None else options.raises,
        policy=ActivityPolicy(
            retry=options.retry or target.retry,
            timeout=options.timeout if options.timeout is not None else target.timeout,
            total_timeout=options.total_timeout if options.total_timeout is not None else target.total_timeout,
        ),
    )
    op = Op("activity", id, name=target.name, site=site, digest=codec.digest64(args, kwargs), spec=spec)
    op.input = target.signature.encode(args, kwargs, limits=limits)
    op.queue = str(options.queue if options.queue is not None else target.queue)
    op.run = child_id(parent, id)
    return op


def child(
    id: str,
    target: Workflow[Any, Any] | str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    limits: Limits,
    site: str,
    parent: str,
    *,
    awaited: bool,
    known: Mapping[str, Workflow[Any, Any]],
) -> Op:
    """A child run; by name if its code is elsewhere."""
    workflow = known.get(check_name(target, "the name of a workflow")) if isinstance(target, str) else target
    if not isinstance(target, str) and not isinstance(target, Workflow):
        raise TypeError(
            f'The workflow of step "{id}" is {target!r}. It must be decorated with @workflow, or the name of one. '
            "Plain functions are called with ctx.step.run."
        )
    for name in ("retry", "total_timeout", "raises"):
        if getattr(options, name) is not None:
            raise TypeError(
                f'The child of step "{id}" was given {name}=, which is a setting of steps. A child is a run, whose own '
                "steps have theirs. Leave it out; timeout= bounds the whole child."
            )
    returns = ANYTHING if workflow is None else workflow.returns
    if options.returns is not None:
        returns = plan(options.returns, what="returns=")
    spec = RemoteCall(
        returns=returns,
        timeout=options.timeout if options.timeout is not None else (workflow.timeout if workflow else None),
        idempotency_key=options.idempotency_key,
        elsewhere=workflow is None,
    )
    name = workflow.name if workflow is not None else str(target)
    op = Op("child", id, name=name, site=site, digest=codec.digest64(args, kwargs), spec=spec)
    if workflow is not None:
        op.input = workflow.signature.encode(args, kwargs, limits=limits)
    else:
        op.input = ANY_CALL.encode(args, kwargs, limits=limits)
    op.queue = str(options.queue if options.queue is not None else (workflow.queue if workflow else ""))
    op.run = options.id if options.id is not None else child_id(parent, id)
    spec.run = op.run
    op.awaited = awaited
    op.parent_close = options.parent_close or ("cancel" if awaited else "abandon")
    return op
