"""Random workflow programs as data, and one interpreter that runs them in all three styles.

`program(seed)` draws a program: nested, untidy, small. It is plain data (tuples), so that it can be printed,
compared and changed. `Program.workflow(work)` makes a workflow of it whose result is the trace of everything it
saw, in the order in which it saw it. Nothing here depends on the hash seed or on addresses.

The interpreter is one generator that yields *thunks*, functions from `ctx.step` to something to wait for; three
small trampolines wait for them as an async, a generator or a sync workflow would.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from perdure.core.errors import ChildFailed, DuplicateStepId, StepFailed, Unwinding
from perdure.core.retry import Retry
from perdure.runtime.registry import Style, Workflow

Statement = tuple[Any, ...]
Body = tuple[Statement, ...]
Work = Callable[[str], Awaitable[Any]]
Plain = Generator[Callable[[Any], Any], Any, None]

STYLES: Final[tuple[Style, ...]] = ("async", "generator", "sync")
SIGNALS: Final = ("go", "stop")
MODERN: Final = sys.version_info >= (3, 11)
"""Whether this interpreter has `asyncio.TaskGroup` and `asyncio.timeout`."""

RETRY: Final = Retry(max_attempts=3, first_delay=2, jitter=False)
ANSWERED_WHILE_CLOSING: Final[list[str]] = []
"""Runs whose code could begin something while it was being closed: must stay empty."""
LEAF: Final = "leaf"
"""The workflow that every child of a program is."""

_CAUGHT: Final[dict[str, tuple[type[BaseException], ...]]] = {
    "failed": (StepFailed,),
    "late": (TimeoutError, asyncio.TimeoutError),
    "cancelled": (asyncio.CancelledError,),
    "any": (Exception,),
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """A workflow as data."""

    seed: int
    style: Style
    body: Body

    def with_body(self, body: Body) -> Program:
        """The same run after a deploy."""
        return replace(self, body=body)

    def workflow(self, work: Work, name: str = "program") -> Workflow[Any, Any]:
        """A workflow that runs it. work: the function of every step."""
        body, style = self.body, self.style

        async def as_async(ctx: Any) -> Any:
            life = _Life(ctx, work)
            await life.drive(body)
            return life.trace

        def as_generator(ctx: Any) -> Any:
            life = _Life(ctx, work)
            yield from _trampoline(life.run(body), ctx.step)
            return life.trace

        def as_sync(ctx: Any) -> Any:
            life = _Life(ctx, work)
            _call_through(life.run(body), ctx.step)
            return life.trace

        made: Any = {"async": as_async, "generator": as_generator, "sync": as_sync}[style]
        return Workflow(made, name=name)


def leaf(work: Work) -> Workflow[Any, Any]:
    """The child of all programs: one step."""

    async def body(ctx: Any) -> Any:
        return await ctx.step.options(retry=RETRY).run("only", work, f"{ctx.run.id}/only")

    return Workflow(body, name=LEAF)


# --- drawing ------------------------------------------------------------------------------------------


def program(seed: int, style: Style | None = None, size: int = 7) -> Program:
    """The program of this seed. size: about how many statements its main body has at most."""
    draw = _Draw(seed)
    chosen = style if style is not None else STYLES[draw.rng.randrange(3)]
    draw.style = chosen
    return Program(seed=seed, style=chosen, body=draw.body(draw.rng.randint(1, size), 0))


class _Draw:
    """One drawing: a generator of random numbers and the ids given so far."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.style: Style = "async"
        self.count = 0
        self.started: list[str] = []
        self.spawned: list[str] = []
        self.used: list[str] = []

    def id(self, kind: str) -> str:
        self.count += 1
        name = f"{kind}{self.count}"
        self.used.append(name)
        return name

    def body(self, length: int, depth: int) -> Body:
        return tuple(self.statement(depth) for _ in range(length))

    def small(self, depth: int) -> Body:
        return self.body(self.rng.randint(1, 3 if depth < 2 else 2), depth + 1)

    def branches(self, depth: int) -> tuple[Body, ...]:
        return tuple(self.small(depth) for _ in range(self.rng.randint(0 if self.rng.random() < 0.05 else 1, 3)))

    def seconds(self) -> float:
        return self.rng.choice([0, 0, 0.5, 1, 1, 2, 3, 7, 60, -1])

    def limit(self) -> float | None:
        return self.rng.choice([None, None, 0, 1, 2, 5])

    def statement(self, depth: int) -> Statement:
        choices = list(_SIMPLE)
        if depth < 3:
            choices += _NESTED
            if self.style == "async":
                choices += _ASYNC
                if MODERN:
                    choices += _MODERN
        if self.style == "generator":
            choices.append("list")
        if self.style == "async":
            choices += ["pause", "pause", "cancel_task"]
        kind = self.rng.choice(choices)
        made: Statement = getattr(self, f"_{kind}")(depth)
        return made

    def _step(self, depth: int) -> Statement:
        return ("step", self.id("step"))

    def _sleep(self, depth: int) -> Statement:
        return ("sleep", self.id("sleep"), self.seconds())

    def _signal(self, depth: int) -> Statement:
        limit = self.limit()
        timed: Statement = ("signal", self.id("wait"), self.rng.choice(SIGNALS), limit)
        return ("try", (timed,), "late", (), ()) if self.rng.random() < 0.7 else timed

    def _start(self, depth: int) -> Statement:
        made = ("start", self.id("start"), self.rng.choice(["step", "step", "child"]))
        self.started.append(made[1])
        return made

    def _result(self, depth: int) -> Statement:
        if not self.started:
            return self._start(depth)
        return ("try", (("result", self.rng.choice(self.started), self.limit()),), "any", (), ())

    def _wait(self, depth: int) -> Statement:
        handles = tuple(self.rng.sample(self.started, min(len(self.started), self.rng.randint(0, 3))))
        return ("wait", handles, self.rng.choice(["ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION"]), self.limit())

    def _drop(self, depth: int) -> Statement:
        return ("drop", self.rng.choice(self.started)) if self.started else self._start(depth)

    def _facts(self, depth: int) -> Statement:
        return ("facts",)

    def _again(self, depth: int) -> Statement:
        # An id that is already used, or one that a later statement will use: an error at this line or at that.
        return ("again", self.rng.choice(self.used)) if self.used else self._step(depth)

    def _child(self, depth: int) -> Statement:
        return ("try", (("child", self.id("child")),), "failed", (), ())

    def _emit(self, depth: int) -> Statement:
        return ("emit", self.id("emit"), self.rng.choice(["cancel", "abandon"]))

    def _bare(self, depth: int) -> Statement:
        return ("try", (("step", self.id("step")),), "failed", self.body(1, depth + 1), ())

    # Blocks of all styles.

    def _try(self, depth: int) -> Statement:
        caught = self.rng.choice(["failed", "late", "cancelled", "any", ""])
        body = self.small(depth)
        handler = self.body(self.rng.randint(0, 1), depth + 1) if caught else ()
        return ("try", body, caught, handler, self.body(self.rng.randint(0, 1), depth + 1))

    def _loop(self, depth: int) -> Statement:
        return ("loop", self.rng.randint(0, 3), self.small(depth))

    def _either(self, depth: int) -> Statement:
        return ("either", self.small(depth), self.small(depth))

    def _patched(self, depth: int) -> Statement:
        return ("patched", self.id("change"), self.small(depth), self.body(self.rng.randint(0, 1), depth + 1))

    def _list(self, depth: int) -> Statement:
        return ("list", tuple(self.id("step") for _ in range(self.rng.randint(0, 3))))

    # Async only.

    def _pause(self, depth: int) -> Statement:
        return ("pause", self.seconds())

    def _gather(self, depth: int) -> Statement:
        return ("gather", self.branches(depth), self.rng.random() < 0.5)

    def _first(self, depth: int) -> Statement:
        when = self.rng.choice([asyncio.FIRST_COMPLETED, asyncio.FIRST_COMPLETED, asyncio.FIRST_EXCEPTION])
        return ("first", self.branches(depth), when, self.rng.choice(["cancel", "leave", "await"]), self.limit())

    def _shield(self, depth: int) -> Statement:
        return ("shield", self.small(depth))

    def _spawn(self, depth: int) -> Statement:
        made = ("spawn", self.id("task"), self.small(depth))
        self.spawned.append(made[1])
        return made

    def _cancel_task(self, depth: int) -> Statement:
        return ("cancel_task", self.rng.choice(self.spawned)) if self.spawned else self._spawn(depth)

    def _await_task(self, depth: int) -> Statement:
        if not self.spawned:
            return self._spawn(depth)
        return ("try", (("await_task", self.rng.choice(self.spawned)),), "any", (), ())

    def _queue(self, depth: int) -> Statement:
        return ("queue", self.rng.randint(0, 2), self.rng.randint(0, 4), self.small(depth), self.small(depth))

    def _guarded(self, depth: int) -> Statement:
        return ("guarded", self.rng.choice(["lock", "semaphore", "condition"]), self.branches(depth))

    def _event(self, depth: int) -> Statement:
        return ("event", self.small(depth), self.small(depth))

    def _items(self, depth: int) -> Statement:
        return ("items", self.rng.randint(0, 3), self.small(depth))

    def _completed(self, depth: int) -> Statement:
        return ("completed", self.branches(depth))

    def _wait_for(self, depth: int) -> Statement:
        return ("try", (("wait_for", self.seconds(), self.small(depth)),), "late", (), ())

    def _group(self, depth: int) -> Statement:
        return ("try", (("group", self.branches(depth)),), "any", (), ())

    def _timeout(self, depth: int) -> Statement:
        return ("try", (("timeout", self.seconds(), self.small(depth)),), "late", self.body(0, depth + 1), ())


_SIMPLE: Final = "step step step bare sleep signal signal start start result wait drop facts again child emit".split()
_NESTED: Final = "try try loop either patched".split()
_ASYNC: Final = "gather gather first first shield spawn await_task queue guarded event items completed wait_for".split()
_MODERN: Final = "group group timeout timeout".split()


# --- running ------------------------------------------------------------------------------------------


class _Life:
    """One life of a program: what it has seen, and what it holds."""

    def __init__(self, ctx: Any, work: Work) -> None:
        self.ctx = ctx
        self.work = work
        self.trace: list[Any] = []
        self.handles: dict[str, Any] = {}
        self.tasks: dict[str, Any] = {}
        self.sum = 0

    def say(self, *words: Any) -> None:
        """Note what was seen; later branches depend on it."""
        self.trace.append(list(words))
        for word in words:
            for letter in str(word):
                self.sum = (self.sum * 31 + ord(letter)) % 65_521

    async def drive(self, body: Body, suffix: str = "") -> None:
        """Run a body as a coroutine."""
        inner = self.run(body, suffix)
        try:
            wanted = inner.send(None)
            while True:
                try:
                    value = await wanted(self.ctx.step)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    wanted = inner.throw(error)
                else:
                    wanted = inner.send(value)
        except StopIteration:
            return
        finally:
            _close(inner)

    def run(self, body: Body, suffix: str = "") -> Plain:
        """The statements of a body, one after the other."""
        for statement in body:
            yield from getattr(self, f"_{statement[0]}")(suffix, *statement[1:])

    # Statements of all styles.

    def _step(self, suffix: str, id: str) -> Plain:
        name = id + suffix
        value = yield lambda step: step.options(retry=RETRY).run(name, self.work, name)
        self.say(name, value)

    def _sleep(self, suffix: str, id: str, seconds: float) -> Plain:
        name = id + suffix
        yield lambda step: step.sleep(name, seconds)
        self.say(name)

    def _signal(self, suffix: str, id: str, signal: str, timeout: float | None) -> Plain:
        name = id + suffix
        value = yield lambda step: step.wait_signal(name, name=signal, timeout=timeout, returns=int)
        self.say(name, value)

    def _start(self, suffix: str, id: str, kind: str) -> Plain:
        name = id + suffix
        step = self.ctx.step.options(retry=RETRY) if kind == "step" else self.ctx.step
        self.handles[id] = step.start(name, LEAF) if kind == "child" else step.start(name, self.work, name)
        self.say("started", name)
        yield from ()

    def _result(self, suffix: str, id: str, timeout: float | None) -> Plain:
        handle = self.handles.get(id)
        if handle is not None:
            value = yield lambda step: handle.result(timeout)
            self.say("result", id, value)

    def _wait(self, suffix: str, ids: Sequence[str], when: str, timeout: float | None) -> Plain:
        handles = [self.handles[id] for id in ids if id in self.handles]
        done, pending = yield lambda step: step.wait(handles, return_when=when, timeout=timeout)
        self.say("wait", [h.id for h in done], [h.id for h in pending])

    def _drop(self, suffix: str, id: str) -> Plain:
        handle = self.handles.get(id)
        if handle is not None:
            yield lambda step: handle.cancel()
            self.say("dropped", id)

    def _facts(self, suffix: str) -> Plain:
        ctx = self.ctx
        self.say(ctx.uuid4().hex[:8], ctx.random.randrange(1000), ctx.now().isoformat(), ctx.cancelled)
        yield from ()

    def _again(self, suffix: str, id: str) -> Plain:
        try:
            yield lambda step: step.options(retry=RETRY).run(id, self.work, id)
        except (DuplicateStepId, StepFailed) as error:
            self.say(type(error).__name__)

    def _child(self, suffix: str, id: str) -> Plain:
        name = id + suffix
        try:
            value = yield lambda step: step.run_workflow(name, LEAF)
        except ChildFailed as failed:
            self.say(name, failed.status)
            raise
        self.say(name, value)

    def _emit(self, suffix: str, id: str, parent_close: str) -> Plain:
        name = id + suffix
        run = yield lambda step: step.options(parent_close=parent_close).emit_workflow(name, LEAF)
        self.say(name, run)

    def _try(self, suffix: str, body: Body, caught: str, handler: Body, final: Body) -> Plain:
        closing = False
        try:
            yield from self.run(body, suffix)
        except _CAUGHT.get(caught, ()) as error:
            self.say("caught", caught, type(error).__name__.replace("_", ""))
            yield from self.run(handler, suffix)
        except GeneratorExit:
            # A generator may not wait while it is closed, but it may ask, and must be refused.
            closing = True
            self._ask_while_closing()
            raise
        finally:
            if not closing:
                yield from self.run(final, suffix)

    def _ask_while_closing(self) -> None:
        try:
            self.ctx.step.start("asked while closing", self.work, "asked while closing")
        except Unwinding:
            return
        ANSWERED_WHILE_CLOSING.append(self.ctx.run.id)

    def _loop(self, suffix: str, times: int, body: Body) -> Plain:
        for turn in range(times):
            yield from self.run(body, f"{suffix}.{turn}")

    def _either(self, suffix: str, one: Body, other: Body) -> Plain:
        yield from self.run(one if self.sum % 2 else other, suffix)

    def _patched(self, suffix: str, change: str, new: Body, old: Body) -> Plain:
        answer = self.ctx.patched(change)
        self.say(change, answer)
        yield from self.run(new if answer else old, suffix)

    def _guard(self, suffix: str, change: str, new: Body) -> Plain:
        # Says nothing: what comes after must not depend on the answer.
        if self.ctx.patched(change):
            yield from self.run(new, suffix)

    def _list(self, suffix: str, ids: Sequence[str]) -> Plain:
        step = self.ctx.step.options(retry=RETRY)
        values = yield lambda _: [step.run(id + suffix, self.work, id + suffix) for id in ids]
        self.say(*ids, *values)

    # Statements of async workflows.

    def _pause(self, suffix: str, seconds: float) -> Plain:
        yield lambda step: asyncio.sleep(seconds)
        self.say("paused")

    def _task(self, body: Body, suffix: str) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self.drive(body, suffix))

    def _gather(self, suffix: str, branches: Sequence[Body], keep: bool) -> Plain:
        found = yield lambda step: asyncio.gather(*(self.drive(b, suffix) for b in branches), return_exceptions=keep)
        self.say("gathered", [type(each).__name__.replace("_", "") for each in found])

    def _first(self, suffix: str, branches: Sequence[Body], when: str, rest: str, timeout: float | None) -> Plain:
        if not branches:
            return
        tasks = {self._task(branch, suffix): n for n, branch in enumerate(branches)}
        # As a set, whose order must be the same on every replay.
        done, pending = yield lambda step: asyncio.wait(set(tasks), timeout=timeout, return_when=when)
        self.say("first", [tasks[t] for t in done], [tasks[t] for t in pending])
        for task in pending:
            if rest == "cancel":
                task.cancel()
        if rest == "await" and pending:
            yield lambda step: asyncio.wait(pending)
            self.say("rest")

    def _shield(self, suffix: str, body: Body) -> Plain:
        yield lambda step: asyncio.shield(self.drive(body, suffix))
        self.say("shielded")

    def _spawn(self, suffix: str, id: str, body: Body) -> Plain:
        self.tasks[id] = self._task(body, suffix)
        yield from ()

    def _cancel_task(self, suffix: str, id: str) -> Plain:
        if id in self.tasks:
            self.say("cancelling", id, self.tasks[id].cancel())
        yield from ()

    def _await_task(self, suffix: str, id: str) -> Plain:
        task = self.tasks.get(id)
        if task is not None and task is not asyncio.current_task():
            yield lambda step: asyncio.wait({task}, timeout=9)
            self.say("awaited", id, task.done())

    def _queue(self, suffix: str, room: int, count: int, first: Body, then: Body) -> Plain:
        queue: asyncio.Queue[int] = asyncio.Queue(room)

        async def produce() -> None:
            for n in range(count):
                await queue.put(n)
                if n == 0:
                    await self.drive(first, suffix)

        async def consume() -> None:
            for n in range(count):
                self.say("got", await queue.get())
                if n == 0:
                    await self.drive(then, suffix)

        yield lambda step: asyncio.gather(consume(), produce())
        self.say("drained")

    def _guarded(self, suffix: str, kind: str, branches: Sequence[Body]) -> Plain:
        guards: dict[str, Callable[[], Any]] = {
            "lock": asyncio.Lock,
            "semaphore": lambda: asyncio.Semaphore(2),
            "condition": asyncio.Condition,
        }
        guard = guards[kind]()

        async def enter(body: Body) -> None:
            async with guard:
                await self.drive(body, suffix)

        yield lambda step: asyncio.gather(*(enter(branch) for branch in branches))

    def _event(self, suffix: str, before: Body, after: Body) -> Plain:
        event = asyncio.Event()

        async def act() -> None:
            await self.drive(before, suffix)
            event.set()

        async def follow() -> None:
            await event.wait()
            await self.drive(after, suffix)

        yield lambda step: asyncio.gather(follow(), act(), return_exceptions=False)

    def _items(self, suffix: str, taken: int, body: Body) -> Plain:
        async def items() -> Any:
            try:
                for n in range(3):
                    await self.drive(body, f"{suffix}~{n}")
                    yield n
            finally:
                self.say("items closed")

        async def take() -> None:
            # An abandoned generator is never finalized behind the code's back: its `finally` says nothing.
            n = 0
            if taken == 0:
                return
            async for item in items():
                self.say("item", item)
                n += 1
                if n == taken:
                    break

        yield lambda step: take()

    def _completed(self, suffix: str, branches: Sequence[Body]) -> Plain:
        async def follow() -> None:
            tasks = [self._task(branch, suffix) for branch in branches]
            for next_one in asyncio.as_completed(tasks):
                try:
                    await next_one
                except Exception as error:
                    self.say("completed", type(error).__name__)
                else:
                    self.say("completed")

        yield lambda step: follow()

    def _wait_for(self, suffix: str, seconds: float, body: Body) -> Plain:
        yield lambda step: asyncio.wait_for(self.drive(body, suffix), seconds)
        self.say("in time")

    if sys.version_info >= (3, 11):

        def _group(self, suffix: str, branches: Sequence[Body]) -> Plain:
            async def together() -> None:
                async with asyncio.TaskGroup() as group:
                    for branch in branches:
                        group.create_task(self.drive(branch, suffix))

            yield lambda step: together()
            self.say("grouped")

        def _timeout(self, suffix: str, seconds: float, body: Body) -> Plain:
            async def limited() -> None:
                async with asyncio.timeout(seconds):
                    await self.drive(body, suffix)

            yield lambda step: limited()
            self.say("in time")


def _trampoline(inner: Plain, step: Any) -> Generator[Any, Any, None]:
    """Waits for thunks as a generator workflow does."""
    try:
        wanted = inner.send(None)
        while True:
            try:
                value = yield wanted(step)
            except GeneratorExit:
                raise
            except BaseException as error:
                wanted = inner.throw(error)
            else:
                wanted = inner.send(value)
    except StopIteration:
        return
    finally:
        _close(inner)


def _call_through(inner: Plain, step: Any) -> None:
    """Waits for thunks as a sync workflow does."""
    try:
        wanted = inner.send(None)
        while True:
            try:
                value = wanted(step)
            except BaseException as error:
                wanted = inner.throw(error)
            else:
                wanted = inner.send(value)
    except StopIteration:
        return
    finally:
        _close(inner)


def _close(inner: Plain) -> None:
    """Close a body whose `finally` blocks wait again: each wait is refused, as in a coroutine that is closed."""
    for _ in range(100):
        try:
            return inner.close()
        except BaseException:
            continue


def tree(body: Body, indent: str = "") -> str:
    """A program as people read it, one statement a line."""
    lines: list[str] = []
    for kind, *facts in body:
        plain = [str(fact) for fact in facts if not _is_block(fact)]
        lines.append(f"{indent}{kind} {' '.join(plain)}".rstrip())
        for fact in facts:
            if _is_block(fact):
                inner = (fact,) if _is_body(fact) else fact
                lines.extend(tree(block, indent + "  |  ") for block in inner if block)
    return "\n".join(lines)


def _is_body(fact: Any) -> bool:
    return isinstance(fact, tuple) and bool(fact) and isinstance(fact[0], tuple) and isinstance(fact[0][0], str)


def _is_block(fact: Any) -> bool:
    return isinstance(fact, tuple) and any(isinstance(each, tuple) for each in fact)
