"""A universe: processes, clients, an operator, two kinds of clocks and a nemesis, stepped by one thread.

Everything that lives is real (`Shift`, `Committer`, `Watcher`, `Housekeeper`, `Heartbeat`, `Client`); only what a
process stands on is simulated: its loop, its clocks, its randomness, its way to the store. Each step asks the tape
which actor goes on. First comes chaos, then everything is healed, and then every run has to end.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import perdure.client
from perdure.client import Client, Core, RunHandle, StartOptions
from perdure.core.errors import (
    IdempotencyConflict,
    LimitExceeded,
    PerdureError,
    RunCancelled,
    RunEnded,
    RunExists,
    RunFailed,
    RunFinished,
    RunNotFound,
    RunTerminated,
    RunTimedOut,
    StoreError,
    UnknownWorkflow,
)
from perdure.core.limits import Limits
from perdure.core.status import Status
from perdure.core.turn import Batch, Mail, Retention, Send
from perdure.runtime.registry import Registry, Workflow
from perdure.stores.contract import Store
from perdure.stores.memory import MemoryStore
from perdure.testing.programs import program
from perdure.testing.sim import flows
from perdure.testing.sim.checks import THREADS, Checks, Effects, Violation
from perdure.testing.sim.loop import SimLoop
from perdure.testing.sim.mirror import Mirrored
from perdure.testing.sim.store import FAULTS, Crashed, SimStore
from perdure.testing.sim.tape import Tape
from perdure.worker import committer as committer_module
from perdure.worker.claiming import Housekeeper, Watcher
from perdure.worker.committer import Committer
from perdure.worker.executing import Executor
from perdure.worker.shift import Settings, Shift

SECOND: Final = 1_000_000
EPOCH: Final = 1_700_000_000 * SECOND
"""Where every universe's store clock begins."""
BOUND: Final = 900 * SECOND
"""Once faults stop, every run has ended after this long."""
SPINS: Final = 3000
"""So many steps within one second of the universe are a loop that never backs off."""
ENDS: Final = {
    RunFailed: "failed",
    RunCancelled: "cancelled",
    RunTerminated: "terminated",
    RunTimedOut: "timed_out",
}
"""The status of which each error tells whoever waits for a result."""
MOVING: Final = frozenset({"write", "claim", "history", "mail", "mailbox", "retire"})


@dataclass(kw_only=True)
class Config:
    """What a universe is like; drawn from its tape, or given for one workflow alone.

    rates: of 1,000 store calls, how many meet each fault. crash_at: the store calls that do, by number, with their
    faults. only: the one workflow that is started, once.
    """

    workers: int = 2
    clients: int = 1
    rates: dict[str, int] = field(default_factory=dict)
    nemesis: int = 0
    powers: tuple[str, ...] = ()
    resident: int = 1000
    concurrency: int = 256
    lease: float = 5.0
    batch: int = 1000
    lag: bool = False
    hints: bool = True
    mailbox: int = 10_000
    budget: int = 200
    old_code: bool = False
    only: Workflow[Any, Any] | None = None
    crash_at: tuple[tuple[int, str], ...] = ()
    programs: tuple[int, ...] = ()
    deep: bool = True


POWERS: Final = ("crash", "pause", "block heartbeat", "stop gracefully", "clock forward", "clock back")


def drawn(tape: Tape) -> Config:
    """Swarm: each universe turns each fault on or off and picks its own rates and settings."""
    kind = tape.choose(10, "kind of universe")
    rates: dict[str, int] = {}
    nemesis = 0
    powers: tuple[str, ...] = ()
    if kind == 1:
        rates = {FAULTS[tape.choose(len(FAULTS), "the one fault")]: 80}
    elif kind > 1:
        for fault in FAULTS:
            if tape.choose(2, f"{fault}?"):
                rates[fault] = (10, 40, 100)[tape.choose(3, "rate")]
        powers = tuple(power for power in POWERS if tape.choose(2, f"{power}?"))
        nemesis = (5, 15, 40)[tape.choose(3, "nemesis")] if powers else 0
    return Config(
        workers=1 + (0, 1, 1, 2, 4)[tape.choose(5, "workers")],
        clients=tape.choose(3, "clients"),
        rates=rates,
        nemesis=nemesis,
        powers=powers,
        resident=(1000, 2, 0)[tape.choose(3, "resident")],
        concurrency=(256, 2)[tape.choose(2, "concurrency")],
        lease=(5.0, 2.0, 15.0)[tape.choose(3, "lease")],
        batch=(1000, 3, 1)[tape.choose(3, "batch")],
        lag=bool(tape.choose(2, "lag")),
        hints=tape.choose(4, "no hints") != 3,
        mailbox=(10_000, 3)[tape.choose(2, "mailbox") if kind else 0],
        budget=(120, 250, 400)[tape.choose(3, "budget")],
        old_code=tape.choose(4, "old code") == 3,
        programs=tuple(tape.choose(100_000, "program") for _ in range(tape.choose(4, "programs"))),
        deep=tape.choose(3, "deep") == 2,
    )


class SimExecutor(Executor):
    """Functions of sync steps run inline: on the loop, or on the body's own thread while the universe waits."""

    def __init__(self, shift: Shift) -> None:
        super().__init__(shift.loop, THREADS, shift.failed)
        self.on_body: threading.Lock | None = None

    def in_thread(self, job: Callable[[], None], execution: Any) -> None:
        execution.begins()
        self.loop.call_soon(job)

    def job(self, execution: Any, after: Callable[[], None] | None = None) -> Callable[[], None]:
        run = super().job(execution, after)
        if after is None:
            return run
        lock = self.on_body = threading.Lock()
        lock.acquire()

        def told() -> None:
            try:
                run()
            finally:
                lock.release()

        return told


class SimShift(Shift):
    """A shift that waits for the functions it gives to a sync body's thread, and is not meant to fail itself."""

    def failed(self, one: Any, error: BaseException) -> None:
        raise error

    def _execute(self, *args: Any) -> None:
        executor: Any = self.executor
        executor.on_body = None
        super()._execute(*args)
        if executor.on_body is not None:
            executor.on_body.acquire()


class SimCore(Core):
    """What a client and its option views share, without threads."""

    def __init__(self, process: Process) -> None:
        super().__init__("memory://", "default", Limits(mailbox=process.world.config.mailbox))
        self.process = process
        self.store = process.store  # type: ignore[assignment]  # it has what a worker asks of a store
        self.loop = process.loop
        self.thread = process  # type: ignore[assignment]  # it is kicked, no more

    async def open(self) -> None:
        """It is open as long as its process lives."""


class Process:
    """A worker with a client, or a client alone: one after another of its lives."""

    def __init__(self, world: World, name: str, *, serves: bool) -> None:
        self.world = world
        self.name = name
        self.serves = serves
        self.life = ""
        self.lives = 0
        self.down = True
        self.leaving = 0
        self.restart_at = 0
        self.leave_at = 0
        self.paused_until = 0
        self.beat_blocked_until = 0
        self.lag = 0
        self.old_code = False
        self.shift: Any = None
        self.kicked = False
        self.reads: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []

    def monotonic(self) -> float:
        return self.world.time / SECOND

    def local_clock(self) -> int:
        """The machine's own clock, which may be wrong."""
        return EPOCH + self.world.time + 700_000

    def kick(self) -> None:
        """The committer has something to write; a thread's job elsewhere, a choice here."""
        self.kicked = True

    def read(self, ask: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """A reader's thread."""
        self.reads.append((ask, done))

    # --- actions ---

    def boot(self) -> None:
        world = self.world
        config = world.config
        world.note(self.name, "boots", "")
        self.lives += 1
        self.life = f"{self.name}.{self.lives}"
        self.down = False
        self.leaving = 0
        self.kicked = False
        self.reads = []
        self.paused_until = self.beat_blocked_until = 0
        self.lag = (0, 1000, 20_000)[world.tape.choose(3, "lag")] if config.lag else 0
        self.old_code = config.old_code and not world.healed and world.tape.choose(2, "old code here") == 1
        self.loop = SimLoop(self.monotonic, self.read)  # type: ignore[abstract]  # nobody asks for the rest
        self.store = SimStore(world, self)
        self.core = SimCore(self)
        self.client: Any = object.__new__(Client)
        self.client._core = self.core
        self.client._options = StartOptions()
        self.flush_at = 0
        if not self.serves:
            self.shift = None
            self.committer = Committer(self.store, self.core._answer)  # type: ignore[arg-type]  # as in SimCore
            self.core.committer = self.committer
            return
        registry = world.old_registry if self.old_code else world.registry
        settings = Settings(
            queues=("default", "remote"),
            concurrency=config.concurrency,
            resident=config.resident,
            lease=config.lease,
            name=self.name,
        )
        self.shift = SimShift(
            self.store,  # type: ignore[arg-type]  # as in SimCore
            registry,
            settings,
            self.loop,
            kick=self.kick,
            monotonic=self.monotonic,
            random_hex=world.hex,
            spread=world.spread,
            ended_run=self.core.run_ended,
            read=self.read,
        )
        self.shift.threads = THREADS
        self.shift.executor = SimExecutor(self.shift)
        self.core.registry = registry
        self.core.shift = self.shift
        self.committer = self.core.committer = self.shift.committer
        self.watcher = Watcher(self.store, self.shift)  # type: ignore[arg-type]  # as in SimCore
        self.keeper = Housekeeper(self.store, self.shift)  # type: ignore[arg-type]  # as in SimCore
        announcement = self.shift.announcement()
        try:
            self.store.announce(announcement)
        except StoreError:
            self.crash()
            return
        self.shift.begin(announcement)
        self.news = -1
        self.watch_at = self.keep_at = world.time
        self.beat_at = world.time + int(config.lease / 3 * SECOND)

    def run_loop(self) -> None:
        self.loop.step()
        if self.loop.errors:
            raise Violation("INV-25", f"an error nobody caught in {self.name}: {self.loop.errors[0]!r}")

    def flush(self) -> None:
        if self.committer.flush():
            self.flush_at = 0
            self.kicked = self.committer.waiting
        else:
            self.flush_at = self.world.time + int(min(0.05 * 2 ** min(self.committer.tries, 10), 5.0) * SECOND)

    def read_one(self) -> None:
        which = self.world.tape.choose(len(self.reads), "which read")
        ask, done = self.reads.pop(which)
        try:
            result = ask()
        except PerdureError as error:
            result = error
        self.loop.call_soon(done, result)

    def watch(self) -> None:
        self.news = self.world.store._news
        # A hint may come every time; the safety poll is this universe's.
        self.watch_at = self.world.time + SECOND
        self._serving(self.watcher.step, "watch_at")

    def keep(self) -> None:
        self.keep_at = self.world.time + int(min(self.world.config.lease / 3, 0.5) * SECOND)
        self._serving(self.keeper.step, "keep_at")

    def _serving(self, step: Callable[[], Any], name: str) -> None:
        try:
            step()
        except PerdureError:
            setattr(self, name, self.world.time + 100_000)

    def beat(self) -> None:
        self.beat_at = self.world.time + int(self.world.config.lease / 3 * SECOND)
        if not self.shift.heartbeat.is_dead:
            self.shift.heartbeat.step()

    def leave(self) -> None:
        """A graceful stop, in the order of `Engine.close`."""
        if self.leaving == 1:
            self.shift.close()
            self.leaving = 2
        elif self.leaving == 2 and not self.committer.waiting:
            self.leaving = 3
            try:
                self.store.retire(self.shift.incarnation)
            except StoreError:
                self.world.crashes += 1
                self.world.note(self.name, "could not retire", "")
            self.world.sometimes["left in peace"] += 1
            self.crash()

    def crash(self) -> None:
        """Gone, with everything it had in memory."""
        if self.down:
            return
        world = self.world
        world.note(self.name, "is gone", "")
        self.down = True
        self.reads = []
        world.operations_lost(self)
        if self.shift is not None:
            for resident in self.shift.residents.values():
                resident.gone = True
                resident.play.close()
            self.shift.executor.forget()
        self.loop.crash()
        self.restart_at = world.time + (0, 200_000, 3 * SECOND)[world.tape.choose(3, "back after")]

    # --- what it could do now ---

    def actions(self, now: int, found: list[tuple[Process, Callable[[], None]]]) -> int:
        """Add what this process could do now; when there will be something if there is nothing."""
        world = self.world
        if self.down:
            if self.restart_at <= now:
                found.append((self, self.boot))
            return self.restart_at
        if self.paused_until > now:
            return self.paused_until
        loop = self.loop
        later = now + 60 * SECOND
        timer = loop.next_timer()
        if loop.ready:
            found.append((self, self.run_loop))
        elif timer is not None:
            at = int(timer * SECOND) + 1
            if timer * SECOND <= now + 0.001:
                found.append((self, self.run_loop))
            elif at < later:
                later = at
        if self.kicked and self.committer.waiting:
            if self.flush_at <= now:
                found.append((self, self.flush))
            elif self.flush_at < later:
                later = self.flush_at
        if self.reads:
            found.append((self, self.read_one))
        shift = self.shift
        if shift is None:
            return later
        if self.leaving:
            if self.leaving == 1 and not shift.idle and self.leave_at > now:
                later = min(later, self.leave_at)
            elif self.leaving == 1 or not self.committer.waiting:
                found.append((self, self.leave))
        if self.leaving < 2:
            if self.watch_at <= now or (world.config.hints and self.news != world.store._news):
                found.append((self, self.watch))
            later = min(later, self.watch_at)
            if self.keep_at <= now:
                found.append((self, self.keep))
            later = min(later, self.keep_at)
        beat_at = max(self.beat_at, self.beat_blocked_until)
        if beat_at <= now:
            found.append((self, self.beat))
        return min(later, beat_at)


class World:
    """See the module. `run` plays it to the end and raises the first `Violation`.

    beside: makes another store, given the clock, on which the same tape is played.
    """

    def __init__(
        self, tape: Tape, config: Config | None = None, beside: Callable[[Callable[[], int]], Store] | None = None
    ) -> None:
        self.tape = tape
        self.config = config if config is not None else drawn(tape)
        self.time = 0
        self.offset = 0
        self.steps = 0
        self.calls = 0
        self.called: list[str] = []
        self.crashes = 0
        self.healed = False
        self.healed_at = 0
        self.store = Mirrored(self.clock, beside) if beside is not None else MemoryStore(clock=self.clock)
        self.sometimes: Counter[str] = Counter()
        self.notes: list[tuple[int, str, str, Any]] = []
        self.network: list[tuple[str, Callable[[], Any]]] = []
        self.late: set[tuple[int, str]] = set()
        self._hidden: set[tuple[int, str]] = set()
        self.violation: Violation | None = None
        self.here: Process | None = None
        self.to_kill: Process | None = None
        self.ids: dict[str, str] = {}
        self._drawn = 0
        self.programs = [
            program(seed).workflow(flows.program_work, name=f"program-{seed}")
            for seed in dict.fromkeys(self.config.programs)
        ]
        shared = [flow for flow in (*flows.CANONICAL, *flows.OTHERS, *self.programs) if flow.name != "changing"]
        self.registry = Registry([*shared, flows.changing_new], flows.ACTIVITIES)
        self.old_registry = Registry([*shared, flows.changing_old], flows.ACTIVITIES)
        self.checks = Checks(self)
        self.effects = Effects(self)
        self.deep = self.config.deep
        self.processes = [Process(self, f"worker-{i + 1}", serves=True) for i in range(self.config.workers)]
        self.processes += [Process(self, f"client-{i + 1}", serves=False) for i in range(self.config.clients)]
        self.operations = self._planned()
        self.running: dict[Any, Process] = {}

    @property
    def fair(self) -> bool:
        """Whether nobody but a run itself can have killed its workers."""
        return self.crashes == 0

    def clock(self) -> int:
        """The store's."""
        return EPOCH + self.time + self.offset

    # --- what everybody draws ---

    def hex(self, count: int) -> str:
        self._drawn += 1
        return hashlib.blake2b(f"{self.tape.seed}:{self._drawn}".encode(), digest_size=count).hexdigest()

    def drawn(self, count: int) -> bytes:
        return bytes.fromhex(self.hex(count))

    def spread(self) -> float:
        return self.tape.choose(8, "jitter") / 8

    def note(self, who: str, what: str, more: Any) -> None:
        self.notes.append((self.time, who, what, more))

    # --- faults ---

    def fault(self, process: Process, call: str) -> str | None:
        """What happens to this call of the store; None: nothing."""
        self.calls += 1
        config = self.config
        if config.only is not None:
            self.called.append(call)
            for number, fault in config.crash_at:
                if self.calls == number:
                    self.crashes += 1
                    return fault
            return None
        if self.healed or not config.rates:
            return None
        drawn = self.tape.choose(1000, "fault")
        level = 1000
        for fault, rate in config.rates.items():
            # Polls are many and say little: most faults are kept for the calls that move runs.
            level -= rate if call in MOVING else rate // 4
            if drawn >= level:
                if call != "write" and (
                    fault in ("busy", "late_mail")
                    or (fault in ("duplicated", "delayed") and call not in ("claim", "reap", "retire"))
                ):
                    return "error_before"
                if fault.startswith("crash"):
                    self.crashes += 1
                return fault
        return None

    def hide(self, batch: Batch) -> None:
        """The messages of this batch have their places, but their transaction has not become visible yet."""
        for send in batch.sends:
            run = self.store._target(send.to)
            if run is not None and send.id not in run.accepted:
                self._hidden.add((run.row.key, send.id))
                self.late.add((run.row.key, send.id))

    def hidden_runs(self) -> set[int]:
        return {run for run, _ in self._hidden}

    def visible(self, mail: Sequence[Mail]) -> Sequence[Mail]:
        if not self._hidden:
            return mail
        return [each for each in mail if (each.run, each.id) not in self._hidden]

    def kill_here(self) -> None:
        """Called by a step: its process dies when the loop comes back."""
        self.to_kill = self.here

    def operations_lost(self, process: Process) -> None:
        for task in [task for task, where in self.running.items() if where is process]:
            del self.running[task]

    # --- the nemesis ---

    def strike(self) -> None:
        powers = self.config.powers
        power = powers[self.tape.choose(len(powers), "power")]
        workers = [p for p in self.processes if not p.down]
        if not workers:
            return
        process = workers[self.tape.choose(len(workers), "whom")]
        self.note("nemesis", power, process.name)
        self.sometimes[power] += 1
        lease = int(self.config.lease * SECOND)
        if power == "crash":
            self.crashes += 1
            process.crash()
        elif power == "pause":
            self.crashes += 1
            process.paused_until = self.time + lease * (1, 2, 4)[self.tape.choose(3, "how long")] // 2
        elif power == "block heartbeat":
            self.crashes += 1
            process.beat_blocked_until = self.time + lease * 2
        elif power == "stop gracefully":
            if process.serves and not process.leaving:
                process.leaving = 1
                process.leave_at = self.time + 3 * SECOND
                process.shift.drain()
        elif power == "clock forward":
            self.crashes += 1
            self.offset += (SECOND, 7 * SECOND, 40 * SECOND)[self.tape.choose(3, "how far")]
        else:
            self.checks.latest = max(self.checks.latest, self.store.now())
            self.offset -= (SECOND, 7 * SECOND)[self.tape.choose(2, "how far")]

    def deliver(self) -> None:
        """What was on its way arrives now, after whatever happened meanwhile."""
        name, apply = self.network.pop(self.tape.choose(len(self.network), "which delivery"))
        self.note("network", "delivers", name)
        self.sometimes["delivered late"] += 1
        apply()

    def reveal(self) -> None:
        self.note("network", "shows late mail", len(self._hidden))
        self._hidden.clear()
        self.store.wake()

    # --- clients ---

    def _planned(self) -> list[tuple[int, str, dict[str, Any]]]:
        """What clients and the operator will ask, and when."""
        tape = self.tape
        config = self.config
        planned: list[tuple[int, str, dict[str, Any]]] = []
        if config.only is not None:
            planned.append((0, "start", {"id": "run-1", "workflow": config.only, "n": 7}))
            planned += [(2 * SECOND + i * SECOND // 2, "signal", {"id": "run-1", "message": f"m{i}"}) for i in range(3)]
            if config.only.name in ("cleaning", "plain_parent"):
                planned.append((SECOND, "cancel", {"id": "run-1"}))
            return planned
        pool = [*flows.CANONICAL, *self.programs * 3, *([flows.changing_new] * 10 if config.old_code else ())]
        for i in range(1 + tape.choose(5, "runs")):
            which = tape.choose(len(pool) + 1, "workflow")
            workflow = pool[which] if which < len(pool) else flows.killing
            begins = tape.choose(6, "when") * 700_000
            facts = {"id": f"run-{i + 1}", "workflow": workflow, "n": tape.choose(12, "n")}
            if tape.choose(4, "key?") == 3:
                facts["key"] = f"key-{i + 1}"
            planned.append((begins, "start", facts))
            if tape.choose(5, "timeout?") == 4:
                facts["timeout"] = (1, 4, 15)[tape.choose(3, "how long")]
            if tape.choose(5, "delay?") == 4:
                facts["delay"] = (0.4, 3, 10)[tape.choose(3, "how long")]
            if tape.choose(5, "twice?") == 4:
                planned.append((begins + tape.choose(3, "again") * SECOND, "start", facts))
            for j in range(tape.choose(5, "signals")):
                at = begins + tape.choose(30, "when") * 200_000
                planned.append((at, "signal", {"id": f"run-{i + 1}", "message": f"m{j}"}))
            if tape.choose(5, "cancel?") == 4:
                planned.append((begins + tape.choose(20, "when") * 300_000, "cancel", {"id": f"run-{i + 1}"}))
            if tape.choose(8, "terminate?") == 7:
                planned.append((begins + tape.choose(20, "when") * 300_000, "terminate", {"id": f"run-{i + 1}"}))
            if tape.choose(6, "prune?") == 5:
                ages = {"age": (0, 1, 10)[tape.choose(3, "how old")], "limit": (100, 1)[tape.choose(2, "how many")]}
                planned.append((begins + tape.choose(30, "when") * 300_000, "prune", ages))
            if tape.choose(4, "look?") == 3:
                planned.append((begins + tape.choose(20, "when") * 300_000, "result", {"id": f"run-{i + 1}"}))
        planned.sort(key=lambda each: each[0])
        return planned

    def operate(self) -> None:
        """The next planned operation, in one of the living processes."""
        places = [p for p in self.processes if not p.down and not p.leaving]
        if not places or (self.operations[0][1] == "prune" and self._may_start()):
            _, name, facts = self.operations.pop(0)
            self.operations.append((self.time + SECOND, name, facts))
            return
        _, name, facts = self.operations.pop(0)
        process = places[self.tape.choose(len(places), "where")]
        self.note(process.name, f"client: {name}", {k: v for k, v in facts.items() if k != "workflow"})
        task = process.loop.create_task(self._operation(process, name, facts))
        self.running[task] = process
        task.add_done_callback(lambda done: self.running.pop(done, None))

    def _may_start(self) -> bool:
        """Whether somebody may still start a run again: what is kept is kept for longer than that."""
        starts = any(name == "start" for _, name, _ in self.operations)
        return starts or bool(self.running or self.network)

    async def _operation(self, process: Process, name: str, facts: dict[str, Any]) -> None:
        if process.down:
            return
        for _ in range(5):
            try:
                await getattr(self, f"_do_{name}")(process, facts)
                return
            except (StoreError, UnknownWorkflow, RunNotFound):
                await asyncio.sleep(0.3)
            except (RunExists, RunFinished, LimitExceeded):
                return
            except IdempotencyConflict as error:
                self.violation = Violation("INV-13", str(error))
                return

    def _handle(self, process: Process, facts: dict[str, Any]) -> RunHandle[Any]:
        return process.client.handle(self.ids.get(facts["id"], facts["id"]))  # type: ignore[no-any-return]

    async def _do_start(self, process: Process, facts: dict[str, Any]) -> None:
        workflow = facts["workflow"]
        if process.old_code and workflow.name == "changing":
            workflow = flows.changing_old
        # A key alone decides which run it is: the id is drawn anew by each call.
        named = {"idempotency_key": facts["key"]} if "key" in facts else {"id": facts["id"]}
        view = process.client.options(**named, timeout=facts.get("timeout"), delay=facts.get("delay"))
        handle = await view.start(workflow, *(() if workflow in self.programs else (facts["n"],)))
        known = self.ids.setdefault(facts["id"], handle.id if "key" in facts else facts["id"])
        if handle.id != known:
            self.violation = Violation("INV-13", f"the start of {facts['id']} answered {handle.id}, it is {known}")
        self.checks.started[handle.id] = workflow.name

    async def _do_signal(self, process: Process, facts: dict[str, Any]) -> None:
        handle = self._handle(process, facts)
        await handle.signal("go", facts["message"], message_id=facts["message"])
        self.checks.sent[handle.id, facts["message"]] = "signal"

    async def _do_cancel(self, process: Process, facts: dict[str, Any]) -> None:
        handle = self._handle(process, facts)
        await handle.cancel("enough")
        self.checks.sent[handle.id, "perdure:cancel"] = "cancel"

    async def _do_terminate(self, process: Process, facts: dict[str, Any]) -> None:
        handle = self._handle(process, facts)
        await handle.terminate("stop")
        self.checks.terminated.add(handle.id)
        self.sometimes["terminated"] += 1

    async def _do_prune(self, process: Process, facts: dict[str, Any]) -> None:
        retention = Retention(
            namespace="default", ended_before=self.store.now() - facts["age"] * SECOND, limit=facts["limit"]
        )
        await process.core.read(lambda: process.store.prune(retention))

    async def _do_result(self, process: Process, facts: dict[str, Any]) -> None:
        handle = self._handle(process, facts)
        try:
            seen = ("completed", await handle.result(timeout=2))
        except TimeoutError:
            return
        except RunEnded as error:
            seen = (ENDS[type(error)], None)
        try:
            self.checks.sees_end(handle.id, seen)
        except Violation as violation:
            # Raised here it would only fail this operation.
            self.violation = violation

    # --- the course of a universe ---

    def run(self) -> None:
        """Chaos, healing, rest."""
        with _ours(self):
            try:
                for process in self.processes:
                    self._do(process, process.boot)
                self._chaos()
                self._heal()
                self._settle()
                self.checks.last()
                if isinstance(self.store, Mirrored):
                    self.store.check()
            finally:
                for process in self.processes:
                    process.crash()

    def _chaos(self) -> None:
        for _ in range(self.config.budget if self.config.only is None else 5000):
            self.step()
            if self.steps % 8 == 0 and self.at_rest():
                return

    def _heal(self) -> None:
        self.note("nemesis", "heals", "")
        self.healed = not self.config.crash_at
        self.healed_at = self.time
        # Leases that were given before the clock went back last until it is there again.
        self.checks.healed_at = max(self.checks.latest, self.store.now())
        while self.network:
            self.deliver()
        self.reveal()
        for process in self.processes:
            process.paused_until = process.beat_blocked_until = 0
            if process.old_code and not process.down:
                self.crashes += 1
                process.crash()
            process.restart_at = min(process.restart_at, self.time)

    def _settle(self) -> None:
        nudge_at = self.time + 5 * SECOND
        commits = self.checks.commits
        second = -SECOND
        while not self.at_rest():
            self.step()
            if self.time >= nudge_at:
                nudge_at = self.time + 5 * SECOND
                self._nudge()
            if self.steps % SPINS == 0:
                if self.time < second + SECOND:
                    raise Violation("INV-23", f"a loop without back-off: {self._unfinished()}")
                second = self.time
            if self.time > self.healed_at + BOUND:
                raise Violation("INV-23", f"{self._unfinished()} after {(self.time - self.healed_at) / SECOND:.0f} s")
            if self.checks.commits > commits + 3000:
                raise Violation("INV-23", f"a loop without back-off: {self._unfinished()}")
        # Acknowledgements still in hand.
        for _ in range(200):
            if not self._idle():
                self.step()
        for process in self.processes:
            shift = process.shift
            if process.down or shift is None:
                continue
            if shift.executing:
                raise Violation("INV-25", f"{process.name} counts {shift.executing} executions at rest")
            if shift.residents or shift.activities:
                left = [*(r.this.id for r in shift.residents.values()), *(a.row.id for a in shift.activities.values())]
                raise Violation("INV-25", f"{process.name} keeps {left} in memory")

    def _idle(self) -> bool:
        return all(
            p.down or not (p.loop.ready or p.committer.waiting or p.reads or (p.shift and p.shift.residents))
            for p in self.processes
        )

    def _nudge(self) -> None:
        """Somebody sends the signals that are waited for."""
        for shadow in list(self.checks.shadows.values()):
            row = shadow.row
            if row.ended_at is not None:
                continue
            if None in shadow.waits.values():
                for name in ("go", "stop"):
                    send = Send(to=row.key, id=f"nudge-{name}-{self.time}", kind="signal", name=name, data="0")
                    self.checks.write(Batch(sends=[send]))
            elif shadow.loose and row.status == Status.WAITING and row.wake_at is None and not shadow.remotes:
                # A program may wait for ever for something of its own.
                self.operations.append((self.time, "terminate", {"id": row.id}))

    def _unfinished(self) -> str:
        return ", ".join(
            f"{row.id} ({row.workflow}) is {row.status}, owner {row.owner and row.owner[:6]}, wake {row.wake_at}"
            for row in (shadow.row for shadow in self.checks.shadows.values())
            if row.ended_at is None
        )

    def at_rest(self) -> bool:
        """Whether nothing more is planned and every run has ended, or is quarantined."""
        if self.operations or self.running or self.network:
            return False
        return all(s.row.ended_at is not None or s.row.status == "quarantined" for s in self.checks.shadows.values())

    def step(self) -> None:
        """One choice, one action."""
        self.steps += 1
        tape = self.tape
        config = self.config
        found: list[tuple[Process | None, Callable[[], None]]] = []
        now = self.time
        later = now + 60 * SECOND
        for process in self.processes:
            at = process.actions(now, found)  # type: ignore[arg-type]  # it only adds to the list
            if at < later:
                later = at
        if self.operations:
            if self.operations[0][0] <= now:
                found.append((None, self.operate))
            elif self.operations[0][0] < later:
                later = self.operations[0][0]
        if config.only is not None:
            # One order of events, so that only the crash differs.
            if not found:
                self.time = max(later, now + 1)
            else:
                self._do(*found[0])
            return
        if self.network:
            found.append((None, self.deliver))
        if self._hidden and (self.healed or tape.choose(24, "shown?") == 23):
            found.append((None, self.reveal))
        if not self.healed and config.nemesis and tape.chance(config.nemesis, "nemesis?"):
            self.strike()
            return
        which = tape.choose(len(found) + 1, "who") if len(found) > 1 or tape.choose(16, "wait?") == 15 else 0
        if not found or which >= len(found):
            # Time goes on to the next appointment, or part of the way while others could act.
            if found:
                later = min(later, now + (1000, 100_000, SECOND)[tape.choose(3, "how long")])
            self.time = max(later, now + 1)
            return
        self._do(*found[which])

    def _do(self, process: Process | None, action: Callable[[], None]) -> None:
        self.here = process
        try:
            action()
        except Crashed:
            assert process is not None
            process.crash()
        self.here = None
        if self.to_kill is not None:
            killed, self.to_kill = self.to_kill, None
            self.sometimes["killed by its step"] += 1
            killed.crash()
        if self.violation is not None:
            raise self.violation


@contextmanager
def _ours(world: World) -> Iterator[None]:
    """The few globals that the engine asks for, for as long as one universe lives."""
    client: Any = perdure.client
    entropy, client.entropy = client.entropy, world
    most, committer_module.MOST = committer_module.MOST, world.config.batch  # type: ignore[misc]  # a constant
    before, flows.WORLD = flows.WORLD, world
    disabled = logging.root.manager.disable
    if disabled < logging.CRITICAL:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        client.entropy, committer_module.MOST, flows.WORLD = entropy, most, before  # type: ignore[misc]  # a constant
